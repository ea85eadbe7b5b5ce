// A CPU allocator that counts the bytes tensors hold, now and at most since the last reset.
//
// Every block is asked from torch's own allocator with one alignment unit in front of it; the size is
// written there, so that freeing needs no table. Context and data are the same pointer, which keeps
// raw_allocate and raw_deallocate working.

#include <atomic>
#include <cstddef>
#include <cstdint>

#include <c10/core/CPUAllocator.h>
#include <c10/core/alignment.h>

namespace {

constexpr std::size_t kHeader = c10::gAlignment;
static_assert(kHeader >= sizeof(std::int64_t));

std::atomic<std::int64_t> live{0};
std::atomic<std::int64_t> peak{0};
c10::Allocator* base = nullptr;

void add(std::int64_t bytes) {
  const std::int64_t now = live.fetch_add(bytes) + bytes;
  std::int64_t seen = peak.load();
  while (now > seen && !peak.compare_exchange_weak(seen, now)) {
  }
}

void release(void* data) {
  if (data == nullptr) {
    return;
  }
  auto* block = static_cast<std::byte*>(data) - kHeader;
  live.fetch_sub(*reinterpret_cast<std::int64_t*>(block));
  base->raw_deallocate(block);
}

struct CountingAllocator final : c10::Allocator {
  c10::DataPtr allocate(std::size_t bytes) override {
    const c10::Device cpu(c10::DeviceType::CPU);
    if (bytes == 0) {
      return {nullptr, nullptr, &release, cpu};
    }
    auto* block = static_cast<std::byte*>(base->raw_allocate(bytes + kHeader));
    *reinterpret_cast<std::int64_t*>(block) = static_cast<std::int64_t>(bytes);
    add(static_cast<std::int64_t>(bytes));
    return {block + kHeader, block + kHeader, &release, cpu};
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return &release;
  }

  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

CountingAllocator counting;

} // namespace

extern "C" {

void install() {
  if (base == nullptr) {
    base = c10::GetCPUAllocator();
    c10::SetCPUAllocator(&counting, /*priority=*/255);
  }
}

std::int64_t live_bytes() {
  return live.load();
}

std::int64_t peak_bytes() {
  return peak.load();
}

void reset_peak() {
  peak.store(live.load());
}
}
