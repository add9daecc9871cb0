#include "gpu/exports.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include "gpu/fake_cuda_testing.h"
#include "gpu/pinned.h"
#include "gpu/target_memory.h"

namespace tensord::gpu {

namespace {

using base::Code;

constexpr uint64_t kMiB = 1 << 20;

class MemoryTest : public testing::Test {
 protected:
  MemoryTest() { ::setenv("FAKE_CUDA_DEVICES", "2", 1); }
  void TearDown() override { EXPECT_EQ(fake_.left(), ""); }

  FakeCuda& fake_ = FakeCuda::get();
  const Driver& driver_ = fake_.driver();
};

class ExportsTest : public MemoryTest {
 protected:
  // "device 0 target 1 offset 4096", "none", or the error.
  std::string find(Address address, uint64_t size_bytes) {
    const auto found = exports_->find(address, size_bytes);
    if (!found) return found.error().message;
    if (!*found) return "none";
    return base::text("device ", (*found)->device, " target ", (*found)->target, " offset ", (*found)->offset);
  }
  void TearDown() override {
    exports_.reset();
    MemoryTest::TearDown();
  }
  std::optional<Exports> exports_{driver_};
};

TEST_F(ExportsTest, addresses_in_one_allocation_are_one_target) {
  const Address memory = fake_.malloc(0, 10'000);
  EXPECT_EQ(find(memory + 5000, 5000), "device 0 target 0 offset 5000");
  EXPECT_EQ(find(memory, 10'000), "device 0 target 0 offset 0");
  ASSERT_EQ(exports_->devices().size(), 1u);
  const ExportedDevice& device = exports_->devices().at(0);
  EXPECT_EQ(std::string(device.uuid.data()), "fake0");
  ASSERT_EQ(device.targets.size(), 1u);
  EXPECT_EQ(device.targets[0].size_bytes, 10'000u);
  EXPECT_TRUE(device.targets[0].ipc);
  fake_.free(memory);
}

TEST_F(ExportsTest, devices_have_targets_of_their_own) {
  const Address low = fake_.malloc(0, kMiB), high = fake_.malloc(1, kMiB), more = fake_.malloc(1, kMiB);
  EXPECT_EQ(find(low, 1), "device 0 target 0 offset 0");
  EXPECT_EQ(find(high, 1), "device 1 target 0 offset 0");
  EXPECT_EQ(find(more + 9, 1), "device 1 target 1 offset 9");
  for (const Address one : {low, high, more}) fake_.free(one);
}

TEST_F(ExportsTest, chunks_that_follow_each_other_are_one_target) {
  const Address memory = fake_.vmm(0, 8 * kMiB, 2 * kMiB);
  EXPECT_EQ(find(memory + 3 * kMiB, 3 * kMiB), base::text("device 0 target 0 offset ", kMiB));
  const Target& target = exports_->devices().at(0).targets[0];
  EXPECT_FALSE(target.ipc);
  EXPECT_EQ(target.size_bytes, 4 * kMiB);
  ASSERT_EQ(target.allocations.size(), 2u);
  EXPECT_EQ(target.allocations[0].second, 2 * kMiB);
  EXPECT_EQ(find(memory + 2 * kMiB, 10), "device 0 target 0 offset 0");
  EXPECT_EQ(find(memory, 8 * kMiB), "device 0 target 1 offset 0");
  fake_.free(memory);
}

TEST_F(ExportsTest, memory_of_the_host_is_none_and_memory_of_a_pool_cannot_be_shared) {
  int on_host = 0;
  EXPECT_EQ(find(reinterpret_cast<Address>(&on_host), 4), "none");
  const Address pool = fake_.pool(0, kMiB);
  const auto found = exports_->find(pool, kMiB);
  ASSERT_FALSE(found);
  EXPECT_EQ(found.error().code, Code::unsupported);
  EXPECT_NE(found.error().message.find("of a pool"), std::string::npos);
  fake_.free(pool);
}

TEST_F(ExportsTest, memory_that_ends_too_early_is_refused) {
  const Address memory = fake_.malloc(0, 8192), behind = fake_.malloc(0, 8192);
  ASSERT_EQ(memory + 8192, behind);
  EXPECT_NE(find(memory, 8193), "device 0 target 0 offset 0");
  fake_.free(behind);
  fake_.free(memory);
  const Address chunks = fake_.vmm(0, 2 * kMiB, 2 * kMiB);
  EXPECT_NE(find(chunks, 2 * kMiB + 1).find("CUDA_ERROR_INVALID_VALUE"), std::string::npos);
  fake_.free(chunks);
}

TEST_F(ExportsTest, what_was_current_on_the_thread_is_so_afterwards) {
  const Address memory = fake_.malloc(0, kMiB), other = fake_.malloc(0, kMiB);
  const auto primary = Primary::retain(driver_, 1);
  Handle before = nullptr, after = nullptr;
  driver_.current(&before);
  for (const char* faults : {"", "cuCtxSetCurrent=999", "cuIpcGetMemHandle=999"}) {
    fake_.fail(faults);
    find(*faults == 0 ? memory : other, 1);
    fake_.fail("");
    driver_.current(&after);
    EXPECT_EQ(before, after) << faults;
  }
  fake_.free(memory);
  fake_.free(other);
}

TEST_F(ExportsTest, a_driver_that_fails_is_named_and_nothing_is_left) {
  const Address plain = fake_.malloc(0, kMiB), chunks = fake_.vmm(0, 4 * kMiB, 2 * kMiB);
  for (const char* name :
       {"cuCtxGetCurrent", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuIpcGetMemHandle", "cuDeviceGetUuid_v2"}) {
    fake_.fail((std::string(name) + "=999").c_str());
    EXPECT_NE(find(plain, 1).find("CUDA_ERROR_UNKNOWN"), std::string::npos) << name;
  }
  for (const char* fault : {"cuPointerGetAttributes=999@2", "cuPointerGetAttributes=999@3",
                            "cuMemRetainAllocationHandle=999", "cuMemRetainAllocationHandle=999@2",
                            "cuMemExportToShareableHandle=999", "cuMemExportToShareableHandle=999@2"}) {
    fake_.fail(fault);
    EXPECT_NE(find(chunks, 4 * kMiB).find("CUDA_ERROR_UNKNOWN"), std::string::npos) << fault;
  }
  fake_.fail("");
  EXPECT_EQ(find(plain, 1), "device 0 target 0 offset 0");
  EXPECT_EQ(find(chunks, 4 * kMiB), "device 0 target 1 offset 0");
  fake_.free(plain);
  fake_.free(chunks);
}

// Of this process, opened once more.
class OpenedMemoryTest : public ExportsTest {
 protected:
  void TearDown() override {
    primary_.reset();
    ExportsTest::TearDown();
  }
  const Target& target_of(Address address, uint64_t size_bytes) {
    const auto place = exports_->find(address, size_bytes);
    EXPECT_TRUE(place && *place);
    return exports_->devices().at((*place)->device).targets[(*place)->target];
  }
  std::shared_ptr<Primary> primary_ = *Primary::retain(driver_, 0);
};

TEST_F(OpenedMemoryTest, it_is_the_same_memory) {
  const Address plain = fake_.malloc(0, kMiB), chunks = fake_.vmm(0, 6 * kMiB, 2 * kMiB);
  for (const auto& [address, size_bytes] : {std::pair(plain, kMiB), std::pair(chunks, 6 * kMiB)}) {
    const auto opened = OpenedMemory::open(driver_, 0, target_of(address, size_bytes));
    ASSERT_TRUE(opened) << opened.error().message;
    EXPECT_NE((*opened)->address(), address);
    reinterpret_cast<char*>((*opened)->address())[size_bytes - 1] = 42;
    EXPECT_EQ(reinterpret_cast<char*>(address)[size_bytes - 1], 42);
  }
  fake_.free(plain);
  fake_.free(chunks);
}

TEST_F(OpenedMemoryTest, what_is_opened_for_reading_cannot_be_written_to) {
  const Address chunks = fake_.vmm(0, 4 * kMiB, 2 * kMiB);
  const auto opened = OpenedMemory::open(driver_, 0, target_of(chunks, 4 * kMiB), kReadOnly);
  ASSERT_TRUE(opened);
  char* data = reinterpret_cast<char*>((*opened)->address());
  EXPECT_EQ(data[kMiB], 0);
  // The kernel refuses it too, without a signal.
  const int zeros = ::open("/dev/zero", O_RDONLY);
  EXPECT_EQ(::read(zeros, data, 1), -1);
  ::close(zeros);
  fake_.free(chunks);
}

TEST_F(OpenedMemoryTest, less_than_the_client_says_is_refused) {
  const Address plain = fake_.malloc(0, kMiB);
  Target target{.size_bytes = kMiB + 1, .ipc = target_of(plain, kMiB).ipc};
  const auto opened = OpenedMemory::open(driver_, 0, target);
  ASSERT_FALSE(opened);
  EXPECT_EQ(opened.error().code, Code::invalid_argument);
  EXPECT_NE(opened.error().message.find("its memory only 1.00 MiB"), std::string::npos) << opened.error().message;
  fake_.free(plain);
}

TEST_F(OpenedMemoryTest, what_is_no_memory_of_a_device_is_refused) {
  Target noise{.size_bytes = 1, .ipc = IpcHandle{'n', 'o'}};
  EXPECT_FALSE(OpenedMemory::open(driver_, 0, noise));
  for (const uint64_t size_bytes : {uint64_t{0}, uint64_t{1}, 2 * kMiB, UINT64_MAX}) {
    Target files{.size_bytes = size_bytes};
    files.allocations.emplace_back(base::Fd(::memfd_create("other", MFD_CLOEXEC)), size_bytes);
    const auto opened = OpenedMemory::open(driver_, 0, files);
    ASSERT_FALSE(opened);
    EXPECT_NE(opened.error().message.find("CUDA_ERROR_INVALID_VALUE"), std::string::npos);
  }
}

TEST_F(OpenedMemoryTest, sizes_that_are_not_those_of_the_allocations_are_refused) {
  const Address chunks = fake_.vmm(0, 4 * kMiB, 2 * kMiB);
  const Target& right = target_of(chunks, 4 * kMiB);
  const uint64_t sizes[][2] = {
      {4 * kMiB, 2 * kMiB}, {2 * kMiB, 4 * kMiB}, {0, 2 * kMiB}, {UINT64_MAX - 2 * kMiB + 1, 4 * kMiB}, {1, 2}};
  for (const auto& [first, second] : sizes) {
    Target wrong{.size_bytes = 1};
    wrong.allocations.emplace_back(*base::duplicate(right.allocations[0].first.get()), first);
    wrong.allocations.emplace_back(*base::duplicate(right.allocations[1].first.get()), second);
    EXPECT_FALSE(OpenedMemory::open(driver_, 0, wrong)) << first << " " << second;
  }
  fake_.free(chunks);
}

TEST_F(OpenedMemoryTest, a_driver_that_fails_is_named_and_nothing_is_left_open) {
  const Address plain = fake_.malloc(0, kMiB), chunks = fake_.vmm(0, 4 * kMiB, 2 * kMiB);
  target_of(plain, kMiB);
  const Target& by_fds = target_of(chunks, 4 * kMiB);
  const Target& by_handle = target_of(plain, kMiB);
  // What a client holds itself.
  const auto before = fake_.left();
  for (const char* fault : {"cuIpcOpenMemHandle_v2=999", "cuPointerGetAttributes=999", "cuMemAddressReserve=999",
                            "cuMemImportFromShareableHandle=999", "cuMemImportFromShareableHandle=999@2",
                            "cuMemMap=999", "cuMemMap=999@2", "cuMemSetAccess=999"}) {
    fake_.fail(fault);
    const auto one = OpenedMemory::open(driver_, 0, by_handle);
    const auto other = OpenedMemory::open(driver_, 0, by_fds);
    EXPECT_NE(one.has_value(), other.has_value()) << fault;
    const std::string& message = one ? other.error().message : one.error().message;
    EXPECT_NE(message.find("CUDA_ERROR_UNKNOWN"), std::string::npos) << fault << ": " << message;
  }
  fake_.fail("");
  EXPECT_EQ(fake_.left(), before);
  fake_.free(plain);
  fake_.free(chunks);
}

class PinnedTest : public MemoryTest {};

TEST_F(PinnedTest, parts_are_registered_when_they_are_needed) {
  auto primary = *Primary::retain(driver_, 0);
  const memory::Segment segment = *memory::make_segment(3 * kPinBytes, 0);
  std::memcpy(segment.data() + kPinBytes + 7, "bytes", 5);
  auto pinned = *Pinned::map(primary, segment.data(), segment.size_bytes());
  EXPECT_EQ(fake_.count("registrations"), 0);
  const auto at = pinned->at(kPinBytes + 7);
  ASSERT_TRUE(at);
  EXPECT_EQ(std::memcmp(*at, "bytes", 5), 0);
  EXPECT_EQ(fake_.count("registrations"), 1);
  ASSERT_TRUE(pinned->at(2 * kPinBytes - 1) && pinned->at(3 * kPinBytes - 1));
  EXPECT_EQ(fake_.count("registrations"), 2);
  fake_.fail("cuMemHostRegister_v2=801");
  const auto refused = pinned->at(0);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, Code::unsupported);
  EXPECT_EQ(refused.error().message, "register host memory with the GPU driver: CUDA_ERROR_NOT_SUPPORTED");
  EXPECT_TRUE(pinned->at(kPinBytes));
  fake_.fail("");
  EXPECT_TRUE(pinned->at(0));
  pinned.reset();
  EXPECT_EQ(fake_.count("registrations"), 0);
}

// Two devices copy out of one segment; it is registered with the first, from whatever thread.
TEST_F(PinnedTest, what_is_current_on_the_thread_stays_so) {
  const memory::Segment segment = *memory::make_segment(2 * kPinBytes, 0);
  auto low = *Primary::retain(driver_, 0);
  auto pinned = *Pinned::map(low, segment.data(), segment.size_bytes());
  ASSERT_TRUE(pinned->at(0));
  auto high = *Primary::retain(driver_, 1);
  Handle before = nullptr, after = nullptr;
  driver_.current(&before);
  ASSERT_TRUE(pinned->at(kPinBytes));
  driver_.current(&after);
  EXPECT_EQ(before, after);
  pinned.reset();
  driver_.current(&after);
  EXPECT_EQ(before, after);
  EXPECT_EQ(fake_.count("registrations"), 0);
}

TEST_F(PinnedTest, what_one_device_needed_stays_registered_when_that_device_is_given_back) {
  const memory::Segment segment = *memory::make_segment(kPinBytes, 0);
  auto low = *Primary::retain(driver_, 0);
  auto pinned = *Pinned::map(low, segment.data(), segment.size_bytes());
  low.reset();
  {
    auto high = *Primary::retain(driver_, 1);
    ASSERT_TRUE(pinned->at(0));
  }
  EXPECT_EQ(fake_.count("registrations"), 1);
  EXPECT_EQ(fake_.count("lost"), 0);
}

TEST_F(PinnedTest, a_device_that_cannot_be_used_is_given_back) {
  fake_.fail("cuCtxSetCurrent=999");
  const auto primary = Primary::retain(driver_, 0);
  ASSERT_FALSE(primary);
  EXPECT_EQ(primary.error().message, "use a GPU: CUDA_ERROR_UNKNOWN");
  fake_.fail("");
  const auto missing = Primary::retain(driver_, 2);
  ASSERT_FALSE(missing);
  EXPECT_EQ(missing.error().message, "begin to use a GPU: CUDA_ERROR_INVALID_DEVICE");
}

}  // namespace

}  // namespace tensord::gpu
