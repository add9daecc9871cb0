// The driver of the GPUs: the few functions of CUDA's driver API that are used, found when the program runs. Everything of
// CUDA's is in this folder; a driver of another make fits behind the same table.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "base/result.h"

namespace tensord::gpu {

using base::Result;
using base::Status;

// Numbers and layouts are those of CUDA 12.8 and newer (cuda.h).
using Answer = int;           // 0: done
using Address = uint64_t;     // of device memory; one address space for all devices and the host
using Handle = void*;         // of a context, a stream, an event
using Allocation = uint64_t;  // of physical device memory
using Uuid = std::array<char, 16>;
using IpcHandle = std::array<char, 64>;

struct Location {
  int type = 1;  // a device
  int id = 0;
};
struct Access {
  Location location;
  int flags = 0;
};
inline constexpr int kReadOnly = 1, kReadWrite = 3;
inline constexpr int kByDescriptor = 1;  // how an allocation is handed to other processes
struct AllocationKind {
  int type = 1;  // stays where it is
  int handle_types = kByDescriptor;
  Location location;
  void* unused = nullptr;
  uint64_t flags = 0;
};

struct Side {
  size_t x_bytes = 0, y = 0;
  int type = 0;  // 1: host, 2: device
  const void* host = nullptr;
  Address device = 0;
  void* array = nullptr;
  size_t pitch = 0;
};
struct Rows {
  Side source, target;
  size_t row_bytes = 0, row_count = 0;
};
struct BatchKind {
  int source_order = 1;  // sources are read in the order of the stream
  Location source_hint{0, 0}, target_hint{0, 0};
  unsigned flags = 0;
};

// What is asked of an address.
enum Attribute : int {
  kMemoryType = 2,
  kDeviceOrdinal = 9,
  kIpcCapable = 10,
  kRangeBegin = 11,
  kRangeBytes = 12,
  kHandleTypes = 14,
  kMappedBytes = 18,  // of the one allocation that is mapped there
  kMappedBegin = 19,
};
inline constexpr int kDeviceMemory = 2;

// Answers that mean something of their own.
inline constexpr Answer kInvalidValue = 1, kOutOfMemory = 2, kNoDevice = 100, kNotPermitted = 800, kNotSupported = 801;
inline constexpr unsigned kPortable = 1;        // registered host memory counts for every device
inline constexpr unsigned kHostReadOnly = 8;    // and is mapped for reading alone
inline constexpr unsigned kNonBlocking = 1;     // a stream that does not wait for the default one
inline constexpr unsigned kSleepUntilDone = 3;  // an event: waiting sleeps, and no times are taken
inline constexpr unsigned kPeers = 1;           // memory of another device is made reachable as it is opened

// Functions of a library, by name. Of those that must be there the first that is missing is kept.
class Functions {
 public:
  struct Found {
    void* address = nullptr;
    template <typename Function>
    operator Function*() const {
      return reinterpret_cast<Function*>(address);
    }
  };
  Functions() = default;  // has none
  explicit Functions(void* library) : library_(library) {}
  Found find(const char* name);
  Found find_optional(const char* name);
  const char* missing() const { return missing_; }

 private:
  void* library_ = nullptr;
  const char* missing_ = nullptr;
};

// Names with _v2 are those that cuda.h means by the plain ones.
struct Driver {
  Functions functions;
  Answer (*init)(unsigned) = functions.find("cuInit");
  Answer (*version)(int*) = functions.find("cuDriverGetVersion");
  Answer (*error_name)(Answer, const char**) = functions.find("cuGetErrorName");
  Answer (*device_count)(int*) = functions.find("cuDeviceGetCount");
  Answer (*device_uuid)(Uuid*, int device) = functions.find("cuDeviceGetUuid_v2");
  Answer (*can_reach)(int* can, int device, int peer) = functions.find("cuDeviceCanAccessPeer");
  // The one that all of a process share; made at the first call.
  Answer (*retain)(Handle*, int device) = functions.find("cuDevicePrimaryCtxRetain");
  Answer (*release)(int device) = functions.find("cuDevicePrimaryCtxRelease_v2");
  Answer (*set_current)(Handle) = functions.find("cuCtxSetCurrent");
  Answer (*current)(Handle*) = functions.find("cuCtxGetCurrent");
  // Waits for all that the current device was told by this process.
  Answer (*finish)() = functions.find("cuCtxSynchronize");
  Answer (*describe)(unsigned count, const Attribute*, void** values,
                     Address) = functions.find("cuPointerGetAttributes");
  Answer (*host_register)(void*, size_t, unsigned flags) = functions.find("cuMemHostRegister_v2");
  Answer (*host_unregister)(void*) = functions.find("cuMemHostUnregister");
  Answer (*make_stream)(Handle*, unsigned flags) = functions.find("cuStreamCreate");
  Answer (*end_stream)(Handle) = functions.find("cuStreamDestroy_v2");
  Answer (*wait_stream)(Handle) = functions.find("cuStreamSynchronize");
  Answer (*make_event)(Handle*, unsigned flags) = functions.find("cuEventCreate");
  Answer (*end_event)(Handle) = functions.find("cuEventDestroy_v2");
  Answer (*record)(Handle event, Handle stream) = functions.find("cuEventRecord");
  Answer (*wait)(Handle event) = functions.find("cuEventSynchronize");
  // Out of registered host memory, and between devices.
  Answer (*copy)(Address target, Address source, size_t, Handle stream) = functions.find("cuMemcpyHtoDAsync_v2");
  Answer (*copy_between)(Address target, Address source, size_t,
                         Handle stream) = functions.find("cuMemcpyDtoDAsync_v2");
  Answer (*copy_rows)(const Rows*, Handle stream) = functions.find("cuMemcpy2DAsync_v2");
  // nullptr before CUDA 13
  Answer (*copy_batch)(Address* targets, Address* sources, size_t* sizes, size_t count, BatchKind*, size_t* kind_begins,
                       size_t kind_count, Handle stream) = functions.find_optional("cuMemcpyBatchAsync_v2");
  Answer (*ipc_export)(IpcHandle*, Address) = functions.find("cuIpcGetMemHandle");
  Answer (*ipc_open)(Address*, IpcHandle, unsigned flags) = functions.find("cuIpcOpenMemHandle_v2");
  Answer (*ipc_close)(Address) = functions.find("cuIpcCloseMemHandle");
  Answer (*allocate)(Allocation*, size_t, const AllocationKind*, uint64_t flags) = functions.find("cuMemCreate");
  Answer (*free)(Allocation) = functions.find("cuMemRelease");
  Answer (*allocation_of)(Allocation*, void* address) = functions.find("cuMemRetainAllocationHandle");
  Answer (*export_fd)(int* fd, Allocation, int handle_type,
                      uint64_t flags) = functions.find("cuMemExportToShareableHandle");
  Answer (*import_fd)(Allocation*, void* fd, int handle_type) = functions.find("cuMemImportFromShareableHandle");
  Answer (*reserve)(Address*, size_t, size_t alignment, Address wish,
                    uint64_t flags) = functions.find("cuMemAddressReserve");
  Answer (*unreserve)(Address, size_t) = functions.find("cuMemAddressFree");
  Answer (*map)(Address, size_t, size_t offset, Allocation, uint64_t flags) = functions.find("cuMemMap");
  Answer (*unmap)(Address, size_t) = functions.find("cuMemUnmap");
  Answer (*set_access)(Address, size_t, const Access*, size_t count) = functions.find("cuMemSetAccess");

  // "CUDA_ERROR_OUT_OF_MEMORY"
  std::string name_of(Answer answer) const;
  // Status of an answer: "WHAT: CUDA_ERROR_...". Code::exhausted, denied and unsupported where the answer says so, else
  // unavailable.
  Status check(Answer answer, const char* what) const;
};

std::string text_of(const Uuid& uuid);  // "GPU-00112233-4455-6677-8899-aabbccddeeff", as nvidia-smi writes it

// Makes a device current on this thread; what was before is so again when it goes.
class Current {
 public:
  Current(const Driver& driver, Handle primary) : driver_(driver), answer_(driver.current(&before_)) {
    if (answer_ == 0) answer_ = driver_.set_current(primary);
  }
  ~Current() {
    if (answer_ == 0) driver_.set_current(before_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  Answer answer() const { return answer_; }

 private:
  const Driver& driver_;
  Handle before_ = nullptr;
  Answer answer_;
};

// The driver of this process, loaded and initialized at the first call; it stays. Code::unavailable, with the reason, when
// there is none, it is too old, or it finds no device. Thread safe.
Result<const Driver*> driver();
// The same where this process has loaded a driver itself; else nullptr, at no cost: who has none has no device memory.
const Driver* loaded_driver();

}  // namespace tensord::gpu
