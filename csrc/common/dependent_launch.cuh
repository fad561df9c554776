// Programmatic dependent launch: a kernel starts while its predecessor on the stream still runs.
//
// Rules that keep a chain of such kernels ordered:
//  * every block of every kernel calls grid_dependency_wait() before it reads what an earlier kernel wrote and before
//  it
//    writes anything. The wait ends when the predecessor has completed and its writes are visible; since the
//    predecessor waited too, everything before it has completed as well;
//  * before the wait only data older than the first kernel of the chain may be read (weights);
//  * the first kernel of a chain is launched without the attribute.
#pragma once

#include <cuda_runtime.h>

#include "common/cuda_check.h"
#include "common/ptx.cuh"

namespace dflash {

// Blocks of `cluster` share a cluster (1 x 1 x 1: none); the grid is a multiple of it.
template <typename... Parameters, typename... Arguments>
void launch_in_clusters(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, dim3 cluster,
                        cudaStream_t stream, bool early_start, const char* what, const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (early_start) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster.x * cluster.y * cluster.z > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = cluster.x;
    attributes[count].val.clusterDim.y = cluster.y;
    attributes[count++].val.clusterDim.z = cluster.z;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  cuda_check(cudaLaunchKernelEx(&config, kernel, arguments...), what);
}

// `cluster` blocks along z share a cluster (1: none).
template <typename... Parameters, typename... Arguments>
void launch_cluster_kernel(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, unsigned cluster,
                           cudaStream_t stream, bool early_start, const char* what, const Arguments&... arguments) {
  launch_in_clusters(kernel, grid, threads, shared_bytes, dim3(1, 1, cluster), stream, early_start, what, arguments...);
}

template <typename... Parameters, typename... Arguments>
void launch_kernel(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                   bool early_start, const char* what, const Arguments&... arguments) {
  launch_cluster_kernel(kernel, grid, threads, shared_bytes, 1, stream, early_start, what, arguments...);
}

}  // namespace dflash
