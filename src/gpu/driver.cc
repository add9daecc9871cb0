#include "gpu/driver.h"

#include <dlfcn.h>

#include "base/bytes.h"
#include "base/text.h"

namespace tensord::gpu {

using base::Code;
using base::fail;

namespace {

constexpr const char* kLibrary = "libcuda.so.1";
constexpr int kVersionMin = 12000;  // 12.0

Status start(Driver& driver) {
  void* library = ::dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* why = ::dlerror();
    return fail(Code::unavailable, "no GPU driver: ", why == nullptr ? kLibrary : why);
  }
  driver = Driver{.functions = Functions(library)};
  if (const char* missing = driver.functions.missing(); missing != nullptr) {
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

Functions::Found Functions::find_optional(const char* name) {
  return {library_ == nullptr ? nullptr : ::dlsym(library_, name)};
}

Functions::Found Functions::find(const char* name) {
  const Found found = find_optional(name);
  if (found.address == nullptr && missing_ == nullptr) missing_ = name;
  return found;
}

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
  std::string digits = base::to_hex(uuid.data(), uuid.size());
  for (const size_t at : {20, 16, 12, 8}) digits.insert(at, 1, '-');
  return base::text("GPU-", digits);
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
