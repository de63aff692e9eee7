# Where torch's headers and libraries are. find_package(Torch) would drag the CUDA toolkit in or
# fail without one; the stable ABI needs two include directories and three libraries.
find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module)

execute_process(
    COMMAND "${Python_EXECUTABLE}" -c [=[
import importlib.util, pathlib, re, sys
spec = importlib.util.find_spec("torch")
if spec is None:
    sys.exit(f"torch is not installed for {sys.executable}")
root = pathlib.Path(spec.origin).parent
version = re.search(r"__version__ = '([^']+)'", (root / "version.py").read_text()).group(1)
print(f"{root.as_posix()};{version}", end="")
]=]
    OUTPUT_VARIABLE _torch
    ERROR_VARIABLE _torch_error
    RESULT_VARIABLE _torch_status
)
if(NOT _torch_status EQUAL 0)
    message(FATAL_ERROR "lightvlm: ${_torch_error}"
        "Install torch >= 2.10 first, or let pip build in isolation.")
endif()
list(GET _torch 0 LIGHTVLM_TORCH_ROOT)
list(GET _torch 1 LIGHTVLM_TORCH_VERSION)
if(LIGHTVLM_TORCH_VERSION VERSION_LESS 2.10)
    message(FATAL_ERROR "lightvlm: found torch ${LIGHTVLM_TORCH_VERSION}, needs >= 2.10")
endif()

add_library(lightvlm_torch INTERFACE)
target_include_directories(lightvlm_torch SYSTEM INTERFACE
    "${LIGHTVLM_TORCH_ROOT}/include"
    "${LIGHTVLM_TORCH_ROOT}/include/torch/csrc/api/include")
# 2.10: one binary for every torch from there on. TORCH_STABLE_ONLY makes anything else an error.
target_compile_definitions(lightvlm_torch INTERFACE
    TORCH_TARGET_VERSION=0x020a000000000000 TORCH_STABLE_ONLY)
# libtorch.so pulls libtorch_cuda.so in where there is one, and the weak stream shim needs it;
# --as-needed would drop it, as no strong symbol comes from it.
target_link_options(lightvlm_torch INTERFACE
    "SHELL:-Wl,--no-as-needed -L${LIGHTVLM_TORCH_ROOT}/lib -ltorch -ltorch_cpu -lc10 -Wl,--as-needed")
