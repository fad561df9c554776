// Arguments of ops whose kernels exchange words with other ranks' (common/exchange.cuh).
#pragma once

#include <string>
#include <vector>

#include "api/check.h"
#include "common/exchange.h"

namespace dflash::api {

struct PeerArguments {
  Tensor exchange;
  std::vector<int64_t> peers;  // addresses of every rank's exchange; this one's is not read
  int64_t rank;
  double patience;

  int64_t world() const { return static_cast<int64_t>(peers.size()); }
};

inline void check_world(const char* op, const PeerArguments& in) {
  const int64_t world = in.world();
  DFLASH_CHECK(op, world >= 1 && world <= kMostRanks, "peers", "have 1..8 addresses", world);
  DFLASH_CHECK(op, in.rank >= 0 && in.rank < world, "rank", "be in 0.." + std::to_string(world - 1), in.rank);
}

// `needed` elements of exchange, on the device of `first`.
inline Peers check_peers(const char* op, const PeerArguments& in, int64_t needed, const Tensor& first) {
  check_world(op, in);
  DFLASH_CHECK(op, in.patience > 0.0 && in.patience < 1e9, "patience", "be above 0 and below 1e9 seconds", in.patience);
  check_shape(op, "exchange", in.exchange, {-1});
  check_dtype(op, "exchange", in.exchange, {ScalarType::Int});
  check_same_device(op, "exchange", in.exchange, first);
  check_contiguous(op, "exchange", in.exchange);
  const auto own = reinterpret_cast<int64_t>(in.exchange.data_ptr());
  DFLASH_CHECK(op, in.exchange.is_cpu() || own % 16 == 0, "exchange", "start at a multiple of 16 bytes", own % 16);
  DFLASH_CHECK(op, in.exchange.numel() >= needed, "exchange", "have at least " + std::to_string(needed) + " elements",
               in.exchange.numel());
  Peers result;
  result.world = static_cast<int>(in.world());
  result.rank = static_cast<int>(in.rank);
  result.patience = static_cast<unsigned long long>(in.patience * 1e9);
  for (int i = 0; i < result.world; ++i) {
    const int64_t address = i == result.rank ? own : in.peers[i];
    DFLASH_CHECK(op, i == result.rank || (address != 0 && address % 16 == 0 && address != own),
                 "peers[" + std::to_string(i) + "]", "be an address of another rank, a multiple of 16", address);
    result.exchange[i] = reinterpret_cast<uint32_t*>(address);
  }
  return result;
}

}  // namespace dflash::api
