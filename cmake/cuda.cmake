# LIGHTVLM_CUDA=auto|on|off  ->  LIGHTVLM_WITH_CUDA, LIGHTVLM_CUDA_REASON where it is off, and the
# CUDA language enabled where it is on.
include("${CMAKE_CURRENT_LIST_DIR}/arches.cmake")

set(LIGHTVLM_CUDA "auto" CACHE STRING "Build the CUDA backend: auto (where nvcc is found), on, off")
set_property(CACHE LIGHTVLM_CUDA PROPERTY STRINGS auto on off)
string(TOLOWER "${LIGHTVLM_CUDA}" _lightvlm_cuda)

set(LIGHTVLM_WITH_CUDA OFF)
set(LIGHTVLM_CUDA_REASON "")
set(LIGHTVLM_NVCC_VERSION "")
set(LIGHTVLM_CUDA_ARCHES "")

# sm_80 runs on every 8.x, sm_90a uses what Hopper alone has, and PTX 90 is compiled by the driver
# on anything newer. TORCH_CUDA_ARCH_LIST and CMAKE_CUDA_ARCHITECTURES say otherwise.
set(_default_arches 80-real 90a-real 90-virtual)

# The compiler itself: what is on PATH may be a script that starts it, from which CMake cannot
# tell where the toolkit lies.
function(lightvlm_find_nvcc result)
    find_program(LIGHTVLM_NVCC nvcc
        HINTS "$ENV{CUDACXX}" "$ENV{CUDA_HOME}/bin" "$ENV{CUDA_PATH}/bin"
        PATHS /usr/local/cuda/bin)
    set(found "")
    if(DEFINED CMAKE_CUDA_COMPILER)
        set(found "${CMAKE_CUDA_COMPILER}")
    elseif(DEFINED ENV{CUDACXX})
        set(found "$ENV{CUDACXX}")
    elseif(LIGHTVLM_NVCC)
        execute_process(COMMAND "${LIGHTVLM_NVCC}" --dryrun -x cu -c /dev/null -o /dev/null
            ERROR_VARIABLE trace OUTPUT_QUIET RESULT_VARIABLE status)
        if(status EQUAL 0 AND trace MATCHES "_HERE_=([^\r\n]+)")
            set(found "${CMAKE_MATCH_1}/nvcc")
        endif()
    endif()
    if(found AND NOT EXISTS "${found}")
        set(found "")
    endif()
    set(${result} "${found}" PARENT_SCOPE)
endfunction()

if(_lightvlm_cuda STREQUAL "off")
    set(LIGHTVLM_CUDA_REASON "turned off by LIGHTVLM_CUDA=off")
elseif(_lightvlm_cuda MATCHES "^(auto|on)$")
    lightvlm_find_nvcc(_nvcc)
    if(_nvcc)
        set(CMAKE_CUDA_COMPILER "${_nvcc}")
        if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
            if(DEFINED ENV{TORCH_CUDA_ARCH_LIST})
                lightvlm_arches_from_torch_list("$ENV{TORCH_CUDA_ARCH_LIST}" CMAKE_CUDA_ARCHITECTURES)
            else()
                set(CMAKE_CUDA_ARCHITECTURES ${_default_arches})
            endif()
        endif()
        enable_language(CUDA)
        set(LIGHTVLM_WITH_CUDA ON)
        set(LIGHTVLM_NVCC_VERSION "${CMAKE_CUDA_COMPILER_VERSION}")
        set(LIGHTVLM_CUDA_ARCHES "${CMAKE_CUDA_ARCHITECTURES}")
    elseif(_lightvlm_cuda STREQUAL "on")
        message(FATAL_ERROR "LIGHTVLM_CUDA=on, but no nvcc was found: put it on PATH, set CUDA_HOME "
            "or CUDACXX, or build with LIGHTVLM_CUDA=auto or off")
    else()
        set(LIGHTVLM_CUDA_REASON "no nvcc was found when the library was built")
    endif()
else()
    message(FATAL_ERROR "LIGHTVLM_CUDA: got '${LIGHTVLM_CUDA}', must be auto, on or off")
endif()
