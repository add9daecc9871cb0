// The driver of tests/fake_cuda.cc in a test's process, and what the tests copy from and to.
#pragma once

#include <dlfcn.h>
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "base/text.h"
#include "gpu/copy_job.h"
#include "gpu/driver.h"

namespace tensord::gpu {

// Loaded at the first call, before driver() looks for one: what has the name of the library already is taken.
class FakeCuda {
 public:
  static FakeCuda& get() {
    static FakeCuda loaded(TENSORD_FAKE_CUDA);
    return loaded;
  }
  explicit FakeCuda(const char* path) {
    library_ = ::dlopen(path, RTLD_NOW | RTLD_GLOBAL);
    EXPECT_NE(library_, nullptr) << ::dlerror();
    find(malloc, "fake_cuda_malloc");
    find(pool, "fake_cuda_pool");
    find(vmm, "fake_cuda_vmm");
    find(free, "fake_cuda_free");
    find(fail, "fake_cuda_fail");
    find(count, "fake_cuda_count");
  }
  const Driver& driver() {
    const auto found = gpu::driver();
    EXPECT_TRUE(found.has_value());
    return **found;
  }

  Address (*malloc)(int device, uint64_t size_bytes);
  Address (*pool)(int device, uint64_t size_bytes);
  Address (*vmm)(int device, uint64_t size_bytes, uint64_t chunk_bytes);
  void (*free)(Address);
  void (*fail)(const char* faults);
  long (*count)(const char* name);

  // What is held that should not be: "streams 2 stray 1".
  std::string left() const {
    std::string text;
    for (const char* name : {"primaries", "registrations", "opened", "allocations", "reservations", "mappings",
                             "streams", "events", "stray", "lost"}) {
      if (const long found = count(name); found != 0) text += std::string(name) + " " + std::to_string(found) + " ";
    }
    return text;
  }

 private:
  template <typename Function>
  void find(Function*& function, const char* name) {
    function = reinterpret_cast<Function*>(::dlsym(library_, name));
    EXPECT_NE(function, nullptr) << name;
  }
  void* library_;
};

// A replica's image of bytes that differ, in segments.
class Image {
 public:
  explicit Image(const std::vector<uint64_t>& sizes) {
    uint32_t state = 1;
    for (const uint64_t size_bytes : sizes) {
      segments.push_back(*memory::make_segment(size_bytes, 0));
      for (uint64_t at = 0; at < size_bytes; at += 4) {
        state = state * 1664525 + 1013904223;
        std::memcpy(segments.back().data() + at, &state, std::min<uint64_t>(4, size_bytes - at));
      }
      bytes.insert(bytes.end(), segments.back().data(), segments.back().data() + size_bytes);
    }
  }
  std::vector<HostSegment> source() const {
    std::vector<HostSegment> source;
    for (const auto& segment : segments) source.push_back({segment.data(), segment.size_bytes(), segment.slot()});
    return source;
  }
  std::vector<memory::Segment> segments;
  std::vector<std::byte> bytes;  // the same, one after another
};

// What copies should do, row by row.
inline void copy_naively(const std::vector<DeviceCopy>& copies, const std::byte* image,
                         std::vector<std::vector<std::byte>>& targets) {
  for (const DeviceCopy& copy : copies) {
    for (uint64_t row = 0; row < copy.row_count; ++row) {
      std::memcpy(targets[copy.target].data() + copy.target_offset + row * copy.target_pitch,
                  image + copy.source_offset + row * copy.source_pitch, copy.row_bytes);
    }
  }
}

}  // namespace tensord::gpu
