// cudaStream_t and cudaError_t for code that g++ compiles, in each of the three builds:
//   CUDA      (LIGHTVLM_WITH_CUDA)  from the toolkit;
//   emulation (LIGHTVLM_EMULATION)  from tests/emulation/emulation.h, no toolkit needed;
//   CPU only  (neither)             absent: LIGHTVLM_HAS_DEVICE is 0 and no launcher is declared.
#pragma once

#if defined(LIGHTVLM_EMULATION)
#include "emulation.h"
#define LIGHTVLM_HAS_DEVICE 1
#elif defined(LIGHTVLM_WITH_CUDA)
#include <cuda_runtime_api.h>
#define LIGHTVLM_HAS_DEVICE 1
#else
#define LIGHTVLM_HAS_DEVICE 0
#endif
