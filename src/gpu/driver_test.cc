#include "gpu/driver.h"

#include <gtest/gtest.h>

#include "gpu/fake_cuda_testing.h"

namespace tensord::gpu {

namespace {

using base::Code;

// The driver of a process is what its first call found: the tests of this file are processes of their own (ctest).
testing::AssertionResult fails(Code code, const std::string& words) {
  const auto found = driver();
  if (found) return testing::AssertionFailure() << "there is a driver";
  if (found.error().code != code || found.error().message.find(words) == std::string::npos)
    return testing::AssertionFailure() << found.error().message;
  const auto again = driver();
  return again || again.error().message != found.error().message ? testing::AssertionFailure() << "it changed"
                                                                 : testing::AssertionSuccess();
}

TEST(Driver, a_machine_without_one_is_told_so) {
  if (void* library = ::dlopen("libcuda.so.1", RTLD_NOW); library != nullptr) GTEST_SKIP() << "there is one";
  EXPECT_EQ(loaded_driver(), nullptr);
  EXPECT_TRUE(fails(Code::unavailable, "no GPU driver: libcuda.so.1"));
}

TEST(Driver, one_that_lacks_a_function_is_too_old) {
  const FakeCuda old(TENSORD_FAKE_CUDA_OLD);
  EXPECT_TRUE(fails(Code::unavailable, "too old: libcuda.so.1 has no cuMemSetAccess"));
  EXPECT_EQ(loaded_driver(), nullptr);
}

TEST(Driver, one_of_before_cuda_12_is_too_old) {
  ::setenv("FAKE_CUDA_VERSION", "11080", 1);
  FakeCuda::get();
  EXPECT_TRUE(fails(Code::unavailable, "it knows CUDA 11.8, 12.0 or newer is needed"));
}

TEST(Driver, one_without_devices_is_none) {
  ::setenv("FAKE_CUDA_DEVICES", "0", 1);
  FakeCuda::get();
  EXPECT_TRUE(fails(Code::unavailable, "finds no device"));
}

TEST(Driver, one_that_does_not_start_says_why) {
  FakeCuda::get().fail("cuInit=100");
  EXPECT_TRUE(fails(Code::unavailable, "start the GPU driver: CUDA_ERROR_NO_DEVICE"));
}

TEST(Driver, one_that_does_not_tell_its_version_says_why) {
  FakeCuda::get().fail("cuDriverGetVersion=999");
  EXPECT_TRUE(fails(Code::unavailable, "CUDA_ERROR_UNKNOWN"));
}

TEST(Driver, one_that_cannot_count_devices_says_why) {
  FakeCuda::get().fail("cuDeviceGetCount=999");
  EXPECT_TRUE(fails(Code::unavailable, "count GPUs: CUDA_ERROR_UNKNOWN"));
}

TEST(Driver, one_that_is_loaded_already_is_found) {
  FakeCuda::get();
  ASSERT_NE(loaded_driver(), nullptr);
  EXPECT_EQ(loaded_driver(), *driver());
}

TEST(Driver, answers_have_codes_and_names) {
  const Driver& driver = FakeCuda::get().driver();
  const struct {
    Answer answer;
    Code code;
    const char* words;
  } cases[] = {{1, Code::unsupported, "w: CUDA_ERROR_INVALID_VALUE"},
               {2, Code::exhausted, "w: CUDA_ERROR_OUT_OF_MEMORY"},
               {800, Code::denied, "w: CUDA_ERROR_NOT_PERMITTED"},
               {801, Code::unsupported, "w: CUDA_ERROR_NOT_SUPPORTED"},
               {700, Code::unavailable, "w: CUDA_ERROR_ILLEGAL_ADDRESS"},
               {4711, Code::unavailable, "w: CUDA error 4711"}};
  EXPECT_TRUE(driver.check(0, "w"));
  for (const auto& one : cases) {
    const Status status = driver.check(one.answer, "w");
    ASSERT_FALSE(status);
    EXPECT_EQ(status.error().code, one.code);
    EXPECT_EQ(status.error().message, one.words);
  }
  FakeCuda::get().fail("cuGetErrorName=999");
  EXPECT_EQ(driver.name_of(700), "CUDA error 700");
}

}  // namespace

}  // namespace tensord::gpu
