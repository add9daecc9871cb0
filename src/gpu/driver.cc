#include "gpu/driver.h"

#include <dlfcn.h>

#include "base/text.h"

namespace tensord::gpu {

using base::Code;
using base::fail;

namespace {

constexpr const char* kLibrary = "libcuda.so.1";
constexpr int kVersionMin = 12000;  // 12.0

// Looks functions up; the first that is missing is kept.
class Symbols {
 public:
  explicit Symbols(void* library) : library_(library) {}
  template <typename Function>
  void find(Function*& function, const char* name) {
    find_optional(function, name);
    if (function == nullptr && missing_ == nullptr) missing_ = name;
  }
  template <typename Function>
  void find_optional(Function*& function, const char* name) {
    function = reinterpret_cast<Function*>(::dlsym(library_, name));
  }
  const char* missing() const { return missing_; }

 private:
  void* library_;
  const char* missing_ = nullptr;
};

// Names with _v2 are those that cuda.h means by the plain ones.
const char* look_up(void* library, Driver& driver) {
  Symbols symbols(library);
  symbols.find(driver.init, "cuInit");
  symbols.find(driver.version, "cuDriverGetVersion");
  symbols.find(driver.error_name, "cuGetErrorName");
  symbols.find(driver.device_count, "cuDeviceGetCount");
  symbols.find(driver.device_uuid, "cuDeviceGetUuid_v2");
  symbols.find(driver.can_reach, "cuDeviceCanAccessPeer");
  symbols.find(driver.retain, "cuDevicePrimaryCtxRetain");
  symbols.find(driver.release, "cuDevicePrimaryCtxRelease_v2");
  symbols.find(driver.set_current, "cuCtxSetCurrent");
  symbols.find(driver.current, "cuCtxGetCurrent");
  symbols.find(driver.finish, "cuCtxSynchronize");
  symbols.find(driver.describe, "cuPointerGetAttributes");
  symbols.find(driver.host_register, "cuMemHostRegister_v2");
  symbols.find(driver.host_unregister, "cuMemHostUnregister");
  symbols.find(driver.make_stream, "cuStreamCreate");
  symbols.find(driver.end_stream, "cuStreamDestroy_v2");
  symbols.find(driver.wait_stream, "cuStreamSynchronize");
  symbols.find(driver.make_event, "cuEventCreate");
  symbols.find(driver.end_event, "cuEventDestroy_v2");
  symbols.find(driver.record, "cuEventRecord");
  symbols.find(driver.wait, "cuEventSynchronize");
  symbols.find(driver.copy, "cuMemcpyHtoDAsync_v2");
  symbols.find(driver.copy_between, "cuMemcpyAsync");
  symbols.find(driver.copy_rows, "cuMemcpy2DAsync_v2");
  symbols.find_optional(driver.copy_batch, "cuMemcpyBatchAsync_v2");
  symbols.find(driver.ipc_export, "cuIpcGetMemHandle");
  symbols.find(driver.ipc_open, "cuIpcOpenMemHandle_v2");
  symbols.find(driver.ipc_close, "cuIpcCloseMemHandle");
  symbols.find(driver.allocate, "cuMemCreate");
  symbols.find(driver.free, "cuMemRelease");
  symbols.find(driver.allocation_of, "cuMemRetainAllocationHandle");
  symbols.find(driver.export_fd, "cuMemExportToShareableHandle");
  symbols.find(driver.import_fd, "cuMemImportFromShareableHandle");
  symbols.find(driver.reserve, "cuMemAddressReserve");
  symbols.find(driver.unreserve, "cuMemAddressFree");
  symbols.find(driver.map, "cuMemMap");
  symbols.find(driver.unmap, "cuMemUnmap");
  symbols.find(driver.set_access, "cuMemSetAccess");
  return symbols.missing();
}

Status start(Driver& driver) {
  void* library = ::dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* why = ::dlerror();
    return fail(Code::unavailable, "no GPU driver: ", why == nullptr ? kLibrary : why);
  }
  if (const char* missing = look_up(library, driver); missing != nullptr) {
    return fail(Code::unavailable, "the GPU driver is too old: ", kLibrary, " has no ", missing,
                "; CUDA 12.0 or newer is needed");
  }
  TRY(driver.check(driver.init(0), "start the GPU driver"));
  int version = 0, device_count = 0;
  TRY(driver.check(driver.version(&version), "ask the GPU driver for its version"));
  if (version < kVersionMin) {
    return fail(Code::unavailable, "the GPU driver is too old: it knows CUDA ", version / 1000, ".",
                version % 1000 / 10, ", 12.0 or newer is needed");
  }
  TRY(driver.check(driver.device_count(&device_count), "count GPUs"));
  if (device_count == 0) return fail(Code::unavailable, "the GPU driver finds no device");
  return {};
}

}  // namespace

std::string Driver::name_of(Answer answer) const {
  const char* name = nullptr;
  if (error_name(answer, &name) != 0 || name == nullptr) return base::text("CUDA error ", answer);
  return name;
}

Status Driver::check(Answer answer, const char* what) const {
  if (answer == 0) return {};
  const Code code = answer == kOutOfMemory                               ? Code::exhausted
                    : answer == kNotPermitted                            ? Code::denied
                    : answer == kNotSupported || answer == kInvalidValue ? Code::unsupported
                                                                         : Code::unavailable;
  return fail(code, what, ": ", name_of(answer));
}

std::string text_of(const Uuid& uuid) {
  std::string text = "GPU-";
  for (size_t at = 0; at < uuid.size(); ++at) {
    constexpr const char* kDigits = "0123456789abcdef";
    if (at == 4 || at == 6 || at == 8 || at == 10) text += '-';
    text += kDigits[static_cast<unsigned char>(uuid[at]) >> 4];
    text += kDigits[static_cast<unsigned char>(uuid[at]) & 15];
  }
  return text;
}

Result<const Driver*> driver() {
  static Driver loaded{};
  static const Status started = start(loaded);
  if (!started) return base::pass_on(started);
  return &loaded;
}

const Driver* loaded_driver() {
  void* library = ::dlopen(kLibrary, RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) return nullptr;
  ::dlclose(library);
  const auto known = driver();
  return known ? *known : nullptr;
}

}  // namespace tensord::gpu
