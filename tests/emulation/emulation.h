// Runs the CUDA kernel sources on the CPU: defines what a .cuh file uses of CUDA, for g++ with
// -DLIGHTVLM_EMULATION. Each thread of a block is a fiber, blocks run one after another. What this
// proves and what it does not: docs/emulation.md. Kernels reach it through common/launch.h.
#pragma once

#ifndef LIGHTVLM_EMULATION
#error "emulation.h stands in for CUDA only with -DLIGHTVLM_EMULATION"
#endif

#include "emulation_types.h"

#include "emulation_atomics.h"
#include "emulation_engine.h"
#include "emulation_math.h"
#include "emulation_warp.h"
