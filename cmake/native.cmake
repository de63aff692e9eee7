# The extension: lightvlm_ops and lightvlm_host.

function(lightvlm_json_list items result)
    set(quoted "")
    foreach(item IN LISTS items)
        list(APPEND quoted "\"${item}\"")
    endforeach()
    list(JOIN quoted ", " joined)
    set(${result} "${joined}" PARENT_SCOPE)
endfunction()

set(_backends cpu)
if(LIGHTVLM_WITH_CUDA)
    list(APPEND _backends cuda)
endif()
lightvlm_json_list("${_backends}" LIGHTVLM_BACKENDS_JSON)
lightvlm_json_list("${LIGHTVLM_CUDA_ARCHES}" LIGHTVLM_ARCHES_JSON)
configure_file(cmake/build_config.h.in "${CMAKE_CURRENT_BINARY_DIR}/generated/build_config.h" @ONLY)

add_library(lightvlm_ops MODULE csrc/library.cpp)
set_target_properties(lightvlm_ops PROPERTIES PREFIX "" OUTPUT_NAME _C SUFFIX .so)
target_include_directories(lightvlm_ops PRIVATE csrc "${CMAKE_CURRENT_BINARY_DIR}/generated")
target_compile_options(lightvlm_ops PRIVATE
    "$<$<COMPILE_LANGUAGE:CXX>:${LIGHTVLM_CXX_FLAGS}>")
target_link_libraries(lightvlm_ops PRIVATE lightvlm_torch)
target_link_options(lightvlm_ops PRIVATE
    "-Wl,--version-script=${PROJECT_SOURCE_DIR}/cmake/exports.map")
set_property(TARGET lightvlm_ops APPEND PROPERTY
    LINK_DEPENDS "${PROJECT_SOURCE_DIR}/cmake/exports.map")

foreach(op IN LISTS LIGHTVLM_OPS)
    target_sources(lightvlm_ops PRIVATE csrc/${op}_cpu.cpp csrc/${op}_op.cpp)
    if(LIGHTVLM_WITH_CUDA)
        target_sources(lightvlm_ops PRIVATE csrc/${op}.cu)
    endif()
endforeach()

if(LIGHTVLM_WITH_CUDA)
    target_compile_definitions(lightvlm_ops PRIVATE LIGHTVLM_WITH_CUDA)
    # g++ links, with the runtime inside: one library for a CPU torch and for any CUDA torch.
    set_target_properties(lightvlm_ops PROPERTIES
        LINKER_LANGUAGE CXX
        CUDA_RUNTIME_LIBRARY Static
        CUDA_VISIBILITY_PRESET hidden)
    target_include_directories(lightvlm_ops SYSTEM PRIVATE
        ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
    # --expt-relaxed-constexpr: constexpr functions of the standard library in kernels.
    target_compile_options(lightvlm_ops PRIVATE
        "$<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr;--threads=1;-lineinfo;-Xcompiler=-fno-gnu-unique>")

    # _C.kernels.json: registers, spills and shared memory of every kernel, for scripts/kernel_budget.py.
    set(_resources "${PROJECT_SOURCE_DIR}/cmake/kernel_resources.py")
    set_target_properties(lightvlm_ops PROPERTIES CUDA_COMPILER_LAUNCHER
        "${Python_EXECUTABLE};${_resources};compile")
    if(CMAKE_CUDA_COMPILER_LAUNCHER)
        set_property(TARGET lightvlm_ops APPEND PROPERTY
            CUDA_COMPILER_LAUNCHER ${CMAKE_CUDA_COMPILER_LAUNCHER})
    endif()
    set(_notes "")
    foreach(op IN LISTS LIGHTVLM_OPS)
        list(APPEND _notes "CMakeFiles/lightvlm_ops.dir/csrc/${op}.cu${CMAKE_CUDA_OUTPUT_EXTENSION}.ptxas")
    endforeach()
    add_custom_command(TARGET lightvlm_ops POST_BUILD
        COMMAND "${Python_EXECUTABLE}" "${_resources}" collect _C.kernels.json ${_notes}
        WORKING_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}"
        BYPRODUCTS "${CMAKE_CURRENT_BINARY_DIR}/_C.kernels.json"
        VERBATIM)
    install(FILES "${CMAKE_CURRENT_BINARY_DIR}/_C.kernels.json" DESTINATION lightvlm_ext)
endif()

set(_host_sources csrc/host.cpp csrc/host/page_pool.cpp)
execute_process(COMMAND "${Python_EXECUTABLE}" -m pybind11 --cmakedir
    OUTPUT_VARIABLE _pybind11_dir OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE _status)
if(_status EQUAL 0)
    find_package(pybind11 CONFIG REQUIRED HINTS "${_pybind11_dir}")
    pybind11_add_module(lightvlm_host MODULE ${_host_sources})
elseif(EXISTS "${LIGHTVLM_TORCH_ROOT}/include/pybind11/pybind11.h")
    # Every torch wheel brings pybind11's headers; machines with torch alone can build too.
    Python_add_library(lightvlm_host MODULE WITH_SOABI ${_host_sources})
    target_include_directories(lightvlm_host SYSTEM PRIVATE "${LIGHTVLM_TORCH_ROOT}/include")
else()
    message(FATAL_ERROR "lightvlm: pybind11 is not installed for ${Python_EXECUTABLE}")
endif()
set_target_properties(lightvlm_host PROPERTIES OUTPUT_NAME _host)
target_include_directories(lightvlm_host PRIVATE csrc)
target_compile_options(lightvlm_host PRIVATE ${LIGHTVLM_CXX_FLAGS})
target_compile_definitions(lightvlm_host PRIVATE LIGHTVLM_VERSION="${LIGHTVLM_FULL_VERSION}")

install(TARGETS lightvlm_ops lightvlm_host LIBRARY DESTINATION lightvlm_ext)
