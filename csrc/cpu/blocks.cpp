// A large block comes fresh from the system, which zeroes it as it is first touched. That takes as long as to compute a
// gradient, and several times as long where pages of 2 MiB must first be made. So what has been touched once is kept
// for the next result, as torch does on devices.
#include "cpu/blocks.h"

#include <cstddef>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>
#if __has_include(<pthread.h>)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/tensors.h"

// Of torch 2.11 and later; null before, where nothing is kept.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* result, int32_t layout, const uint8_t* metadata,
    int64_t metadata_bytes, void (*deleter)(void* data, void* context), void* context);

namespace smart_kernels {
namespace {

constexpr int64_t kKeptBytes = 256 << 20;
constexpr std::ptrdiff_t kKeptBlocks = 32;
constexpr int64_t kHugeBytes = 4 << 20;

// With pages of 4 KiB there are 512 times as many faults as with those of 2 MiB, which are asked for inside.
Tensor with_huge_pages(Tensor x, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t data = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
  const uintptr_t begin = (data + page - 1) / page * page, end = (data + bytes) / page * page;
  if (bytes >= kHugeBytes) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: may be refused
#endif
  return x;
}

// Tensors of bytes that nobody uses, the oldest first
class Kept {
 public:
  Kept() { blocks_.reserve(kKeptBlocks); }

  // The smallest that holds so many bytes, if it does not hold twice as many; else a new one
  Tensor take(int64_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      auto best = blocks_.end();
      for (auto block = blocks_.begin(); block != blocks_.end(); ++block)
        if (const int64_t size = block->numel();
            bytes <= size && size < 2 * bytes && (best == blocks_.end() || size <= best->numel()))
          best = block;
      if (best != blocks_.end()) {
        Tensor taken = std::move(*best);
        blocks_.erase(best);
        bytes_ -= taken.numel();
        return taken;
      }
    }
    const int64_t one = 1;
    return with_huge_pages(empty_strided(&bytes, &one, 1, aoti_torch_dtype_uint8()), bytes);
  }

  void put(Tensor block) {
    const int64_t size = block.numel();
    if (size > kKeptBytes) return;
    std::vector<Tensor> dropped;  // and freed when the lock is open again
    const std::lock_guard lock(mutex_);
    auto rest = blocks_.begin();
    for (; bytes_ + size > kKeptBytes || blocks_.end() - rest >= kKeptBlocks; ++rest) {
      bytes_ -= rest->numel();
      dropped.push_back(std::move(*rest));
    }
    blocks_.erase(blocks_.begin(), rest);
    blocks_.push_back(std::move(block));
    bytes_ += size;
  }

  int64_t clear() {
    std::vector<Tensor> dropped;
    const std::lock_guard lock(mutex_);
    dropped.swap(blocks_);
    blocks_.reserve(kKeptBlocks);
    return std::exchange(bytes_, 0);
  }

  // A child of a fork has the lock as it was, but none of the threads that could open it.
  std::mutex& mutex() { return mutex_; }

 private:
  std::mutex mutex_;
  std::vector<Tensor> blocks_;
  int64_t bytes_ = 0;
};

Kept& kept() {
  static Kept* const blocks = [] {
#if __has_include(<pthread.h>)
    pthread_atfork([] { kept().mutex().lock(); }, [] { kept().mutex().unlock(); }, [] { kept().mutex().unlock(); });
#endif
    return new Kept;  // never destroyed: a result may outlive all that a process takes down
  }();
  return *blocks;
}

}  // namespace

Tensor empty_large(const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType dtype, int64_t bytes) {
  if (!torch_from_blob) return with_huge_pages(empty_strided(sizes, strides, dim, dtype_code(dtype)), bytes);
  Tensor* const block = new Tensor(kept().take(bytes));
  const auto give_back = [](void*, void* context) {
    const std::unique_ptr<Tensor> block(static_cast<Tensor*>(context));
    kept().put(std::move(*block));
  };
  constexpr int32_t kNoIndex = -1;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(
      block->mutable_data_ptr(), dim, sizes, strides, 0, dtype_code(dtype), aoti_torch_device_type_cpu(), kNoIndex,
      &handle, aoti_torch_layout_strided(), nullptr, 0, give_back, block));
  return Tensor(handle);
}

int64_t empty_cache() { return kept().clear(); }

}  // namespace smart_kernels
