// One spelling for "callable from host and device" in headers that both compilers read.
#pragma once

#if defined(__CUDACC__)
#define DFLASH_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DFLASH_HOST_DEVICE inline
#endif
