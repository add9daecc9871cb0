#include "gpu/device.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>

#include "gpu/exports.h"
#include "gpu/fake_cuda_testing.h"

namespace tensord::gpu {

namespace {

using base::Code;
using base::TargetState;

constexpr uint64_t kKiB = 1 << 10, kMiB = 1 << 20;
constexpr int64_t kForeverMs = 3'600'000;
constexpr auto kDeadline = std::chrono::seconds(30);  // only a hang reaches it

// Memory of a client, and how a daemon would come to know it.
struct ClientMemory {
  ClientMemory(FakeCuda& driver, Address begin, uint64_t size) : fake(driver), address(begin), size_bytes(size) {
    exports.emplace(fake.driver());
    EXPECT_TRUE(exports->find(begin, size));
    std::memset(reinterpret_cast<void*>(begin), 0x5a, size);
  }
  ~ClientMemory() {
    exports.reset();
    fake.free(address);
  }
  Target target() const {
    const Target& known = exports->devices_target();
    Target copy{.size_bytes = known.size_bytes, .ipc = known.ipc};
    for (const auto& [fd, bytes] : known.allocations) copy.allocations.emplace_back(*base::duplicate(fd.get()), bytes);
    return copy;
  }
  std::vector<std::byte> bytes() const {
    const auto* data = reinterpret_cast<const std::byte*>(address);
    return {data, data + size_bytes};
  }
  struct KnownExports : Exports {
    using Exports::Exports;
    const Target& devices_target() { return devices().begin()->second.targets.at(0); }
  };
  FakeCuda& fake;
  const Address address;
  const uint64_t size_bytes;
  mutable std::optional<KnownExports> exports;
};

// How a job ended.
struct Outcome {
  int done_count = 0;
  std::optional<Result<DeviceReport>> result;
};

class DeviceTest : public testing::Test {
 protected:
  DeviceTest() { ::setenv("FAKE_CUDA_DEVICES", "2", 1); }
  void SetUp() override { start(); }
  void TearDown() override {
    device_.reset();
    image_.reset();
    memories_.clear();
    EXPECT_EQ(fake_.left(), "");
  }
  void start(int64_t idle_ms = kForeverMs) {
    device_.reset();
    device_ = std::make_unique<Device>(driver_, 0, idle_ms);
  }

  ClientMemory& plain(uint64_t size_bytes, int device = 0) {
    return *memories_.emplace_back(std::make_unique<ClientMemory>(fake_, fake_.malloc(device, size_bytes), size_bytes));
  }
  ClientMemory& chunked(uint64_t size_bytes) {
    return *memories_.emplace_back(
        std::make_unique<ClientMemory>(fake_, fake_.vmm(0, size_bytes, 2 * kMiB), size_bytes));
  }

  // A job whose bytes are all there.
  std::unique_ptr<CopyJob> job(uint64_t client, uint64_t number, const std::vector<const ClientMemory*>& targets,
                               std::vector<DeviceCopy> copies) {
    auto job = std::make_unique<CopyJob>();
    job->client = client;
    job->number = number;
    job->image_bytes = image_->bytes.size();
    job->source = image_->source();
    for (const ClientMemory* target : targets) job->targets.push_back(target->target());
    job->copies = std::move(copies);
    job->ready = [](uint64_t, uint64_t) -> Result<bool> { return true; };
    job->want = [](uint64_t, uint64_t) {};
    job->done = [this, client, number](Result<DeviceReport> report) {
      const std::lock_guard lock(mutex_);
      Outcome& outcome = outcomes_[{client, number}];
      ++outcome.done_count;
      outcome.result = std::move(report);
      changed_.notify_all();
    };
    EXPECT_TRUE(check(*job));
    return job;
  }

  // Waits until it has ended.
  Result<DeviceReport> outcome(uint64_t client, uint64_t number) {
    std::unique_lock lock(mutex_);
    const bool ended = changed_.wait_for(lock, kDeadline, [&] {
      return outcomes_[{client, number}].result.has_value();
    });
    if (!ended) std::abort();
    return *outcomes_[{client, number}].result;
  }
  int done_count(uint64_t client, uint64_t number) {
    const std::lock_guard lock(mutex_);
    return outcomes_[{client, number}].done_count;
  }
  void until(const std::function<bool()>& condition) {
    const auto deadline = std::chrono::steady_clock::now() + kDeadline;
    while (!condition()) {
      if (std::chrono::steady_clock::now() > deadline) std::abort();
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }

  // Whether a memory holds what the copies to it say, and what it held before elsewhere.
  bool holds(const ClientMemory& memory, const std::vector<DeviceCopy>& copies) {
    std::vector<std::vector<std::byte>> wanted = {std::vector<std::byte>(memory.size_bytes, std::byte{0x5a})};
    copy_naively(copies, image_->bytes.data(), wanted);
    return memory.bytes() == wanted[0];
  }

  FakeCuda& fake_ = FakeCuda::get();
  const Driver& driver_ = fake_.driver();
  std::optional<Image> image_{std::in_place, std::vector<uint64_t>{3 * kMiB, kMiB, 64 * kKiB}};
  std::vector<std::unique_ptr<ClientMemory>> memories_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::pair<uint64_t, uint64_t>, Outcome> outcomes_;
  std::unique_ptr<Device> device_;
};

// A large one, small ones, rows with gaps, and one over the borders of segments.
std::vector<DeviceCopy> mixed_copies() {
  std::vector<DeviceCopy> copies = {{.source_offset = 5, .target_offset = 3, .row_bytes = 2 * kMiB}};
  for (uint64_t at = 0; at < 10; ++at)
    copies.push_back({.source_offset = 2 * kMiB + at * 1000, .target_offset = 2 * kMiB + at * 2000, .row_bytes = 700});
  copies.push_back({.source_offset = 100,
                    .target_offset = 5 * kMiB / 2,
                    .row_bytes = 64,
                    .row_count = 1000,
                    .source_pitch = 4000,
                    .target_pitch = 128});
  copies.push_back({.source_offset = 3 * kMiB - 11, .target_offset = 3 * kMiB, .row_bytes = kMiB + 30});
  return copies;
}

// So many that they take several chunks.
std::vector<DeviceCopy> many_copies(uint64_t count = 6000) {
  std::vector<DeviceCopy> copies;
  for (uint64_t at = 0; at < count; ++at)
    copies.push_back({.source_offset = at * 32, .target_offset = at * 48, .row_bytes = 16});
  return copies;
}

TEST_F(DeviceTest, bytes_go_where_the_copies_say) {
  for (const ClientMemory* memory : {&plain(5 * kMiB), &chunked(6 * kMiB)}) {
    device_->submit(job(1, memory->address, {memory}, mixed_copies()));
    const auto report = outcome(1, memory->address);
    ASSERT_TRUE(report) << report.error().message;
    EXPECT_EQ(report->bytes, 2 * kMiB + 7000 + 64000 + kMiB + 30);
    EXPECT_GT(report->end_ns, report->begin_ns);
    EXPECT_TRUE(holds(*memory, mixed_copies()));
  }
}

TEST_F(DeviceTest, several_targets_of_one_job) {
  const ClientMemory &one = plain(kMiB), &other = chunked(4 * kMiB), &third = plain(100);
  std::vector<DeviceCopy> copies;
  for (uint32_t at = 0; at < 3; ++at) copies.push_back({.source_offset = at * 1000, .row_bytes = 100, .target = at});
  device_->submit(job(1, 1, {&one, &other, &third}, copies));
  ASSERT_TRUE(outcome(1, 1));
  EXPECT_TRUE(holds(one, {{.row_bytes = 100}}));
  EXPECT_TRUE(holds(other, {{.source_offset = 1000, .row_bytes = 100}}));
  EXPECT_TRUE(holds(third, {{.source_offset = 2000, .row_bytes = 100}}));
}

TEST_F(DeviceTest, segments_of_several_parts) {
  image_.emplace(std::vector<uint64_t>{kPinBytes + 5 * kMiB, 2 * kMiB});
  const ClientMemory& memory = plain(80 * kMiB);
  const std::vector<DeviceCopy> copies = {{.source_offset = 7, .target_offset = 9, .row_bytes = kPinBytes + 6 * kMiB},
                                          {.source_offset = kPinBytes - 5000,
                                           .target_offset = 75 * kMiB,
                                           .row_bytes = 1000,
                                           .row_count = 100,
                                           .source_pitch = 3000,
                                           .target_pitch = 1000}};
  device_->submit(job(1, 1, {&memory}, copies));
  ASSERT_TRUE(outcome(1, 1));
  EXPECT_TRUE(holds(memory, copies));
  EXPECT_EQ(fake_.count("registrations"), 3);
}

TEST_F(DeviceTest, nothing_to_copy_is_done_at_once) {
  device_->submit(job(1, 1, {&plain(10)}, {}));
  const auto report = outcome(1, 1);
  ASSERT_TRUE(report);
  EXPECT_EQ(report->bytes, 0u);
}

TEST_F(DeviceTest, small_copies_are_handed_over_together) {
  const ClientMemory& memory = plain(kMiB);
  device_->submit(job(1, 1, {&memory}, many_copies()));
  const auto report = outcome(1, 1);
  ASSERT_TRUE(report);
  EXPECT_EQ(report->call_count, 6u);
  EXPECT_TRUE(holds(memory, many_copies()));
}

TEST_F(DeviceTest, a_driver_without_the_batch_call_takes_small_copies_one_by_one) {
  Driver older = driver_;
  older.copy_batch = nullptr;
  const ClientMemory& memory = plain(kMiB);
  device_ = std::make_unique<Device>(older, 0, kForeverMs);
  device_->submit(job(1, 1, {&memory}, many_copies()));
  const auto report = outcome(1, 1);
  ASSERT_TRUE(report);
  EXPECT_EQ(report->call_count, 6000u);
  EXPECT_TRUE(holds(memory, many_copies()));
  device_.reset();
  image_.reset();  // its pinned memory uses that driver
}

TEST_F(DeviceTest, jobs_of_several_clients_all_end) {
  std::vector<const ClientMemory*> memories;
  for (uint64_t client = 1; client <= 8; ++client) {
    memories.push_back(&plain(5 * kMiB));
    device_->submit(job(client, 1, {memories.back()}, client % 2 == 0 ? mixed_copies() : many_copies()));
  }
  for (uint64_t client = 1; client <= 8; ++client) {
    ASSERT_TRUE(outcome(client, 1));
    EXPECT_TRUE(holds(*memories[client - 1], client % 2 == 0 ? mixed_copies() : many_copies()));
    EXPECT_EQ(done_count(client, 1), 1);
  }
}

TEST_F(DeviceTest, a_job_whose_bytes_come_late_lets_others_pass_and_asks_for_them) {
  const ClientMemory &late = plain(5 * kMiB), &other = plain(5 * kMiB);
  std::atomic<bool> there = false;
  std::atomic<int> want_count = 0;
  std::atomic<uint64_t> wanted_begin = 0;
  auto waits = job(1, 1, {&late}, mixed_copies());
  waits->ready = [&](uint64_t begin, uint64_t) -> Result<bool> { return there || begin < kMiB; };
  waits->want = [&](uint64_t begin, uint64_t) { wanted_begin = begin, ++want_count; };
  device_->submit(std::move(waits));
  device_->submit(job(2, 1, {&other}, mixed_copies()));
  ASSERT_TRUE(outcome(2, 1));
  EXPECT_TRUE(holds(other, mixed_copies()));
  until([&] { return want_count > 0; });
  EXPECT_GE(wanted_begin, kMiB);
  EXPECT_EQ(done_count(1, 1), 0);
  there = true;
  const auto report = outcome(1, 1);
  ASSERT_TRUE(report);
  EXPECT_EQ(want_count, 1);
  EXPECT_GT(report->wait_ns, 0);
  EXPECT_TRUE(holds(late, mixed_copies()));
}

TEST_F(DeviceTest, a_load_that_fails_ends_the_job_and_says_whether_anything_was_written) {
  const ClientMemory& memory = plain(5 * kMiB);
  for (const uint64_t there_bytes : {uint64_t{0}, 3 * kMiB}) {
    auto fails = job(1, there_bytes, {&memory}, mixed_copies());
    fails->ready = [=](uint64_t, uint64_t end) -> Result<bool> {
      if (end <= there_bytes) return true;
      return base::fail(Code::corrupt, "the file is damaged");
    };
    device_->submit(std::move(fails));
    const auto report = outcome(1, there_bytes);
    ASSERT_FALSE(report);
    EXPECT_EQ(report.error().code, Code::corrupt);
    EXPECT_EQ(report.error().target, there_bytes == 0 ? TargetState::untouched : TargetState::dirty);
  }
}

TEST_F(DeviceTest, a_cancelled_job_ends_while_its_bytes_are_not_there) {
  const ClientMemory& memory = plain(5 * kMiB);
  auto never = job(1, 7, {&memory}, mixed_copies());
  never->ready = [](uint64_t, uint64_t end) -> Result<bool> { return end <= 3 * kMiB; };
  device_->submit(std::move(never));
  device_->cancel(1, 8);
  device_->cancel(2, 7);
  until([&] { return memory.bytes()[3] != std::byte{0x5a}; });
  EXPECT_EQ(done_count(1, 7), 0);
  device_->cancel(1, 7);
  const auto report = outcome(1, 7);
  ASSERT_FALSE(report);
  EXPECT_EQ(report.error().code, Code::cancelled);
  EXPECT_EQ(report.error().target, TargetState::dirty);
  device_->cancel(1, 7);
  device_->submit(job(1, 9, {&memory}, mixed_copies()));
  ASSERT_TRUE(outcome(1, 9));
  EXPECT_EQ(done_count(1, 7), 1);
}

// What a client frees stays taken while it is open here.
TEST_F(DeviceTest, memory_is_closed_when_its_job_is_over) {
  const ClientMemory &one = plain(kMiB), &other = chunked(4 * kMiB);
  for (uint64_t number = 0; number < 3; ++number) {
    device_->submit(job(1, number, {number % 2 == 0 ? &one : &other}, many_copies()));
    ASSERT_TRUE(outcome(1, number));
    EXPECT_EQ(fake_.count("opened"), 0);
    EXPECT_EQ(fake_.count("mappings"), 2);
    EXPECT_EQ(fake_.count("reservations"), 1);
  }
}

TEST_F(DeviceTest, jobs_that_share_memory_close_it_with_the_last) {
  const ClientMemory& memory = plain(kMiB);
  std::atomic<bool> there = false;
  auto late = job(1, 1, {&memory}, many_copies());
  late->ready = [&](uint64_t begin, uint64_t) -> Result<bool> { return there || begin < 80'000; };
  device_->submit(std::move(late));
  until([&] { return fake_.count("opened") == 1; });
  device_->submit(job(2, 1, {&memory}, many_copies()));
  ASSERT_TRUE(outcome(2, 1));
  EXPECT_EQ(fake_.count("opened"), 1);
  there = true;
  ASSERT_TRUE(outcome(1, 1));
  EXPECT_EQ(fake_.count("opened"), 0);
  EXPECT_TRUE(holds(memory, many_copies()));
}

TEST_F(DeviceTest, jobs_of_a_client_that_is_gone_end) {
  const ClientMemory& memory = plain(kMiB);
  for (const uint64_t client : {1, 2}) {
    auto never = job(client, 1, {&memory}, many_copies());
    never->ready = [](uint64_t begin, uint64_t) -> Result<bool> { return begin < 80'000; };
    device_->submit(std::move(never));
  }
  until([&] { return fake_.count("opened") == 1; });
  device_->forget(1);
  const auto report = outcome(1, 1);
  ASSERT_FALSE(report);
  EXPECT_EQ(report.error().code, Code::cancelled);
  EXPECT_EQ(done_count(2, 1), 0);
  device_->forget(2);
  ASSERT_FALSE(outcome(2, 1));
  EXPECT_EQ(fake_.count("opened"), 0);
}

TEST_F(DeviceTest, an_idle_device_is_given_back_and_can_be_used_again) {
  start(1);
  const ClientMemory& memory = plain(5 * kMiB);
  for (uint64_t number = 0; number < 3; ++number) {
    device_->submit(job(1, number, {&memory}, mixed_copies()));
    ASSERT_TRUE(outcome(1, number));
    until([&] { return fake_.left().empty(); });
  }
}

TEST_F(DeviceTest, a_segment_that_goes_is_unregistered) {
  device_->submit(job(1, 1, {&plain(kMiB)}, many_copies(10)));
  ASSERT_TRUE(outcome(1, 1));
  EXPECT_EQ(fake_.count("registrations"), 1);
  image_.reset();
  EXPECT_EQ(fake_.count("registrations"), 0);
}

TEST_F(DeviceTest, two_devices_share_a_segment) {
  const ClientMemory &low = plain(5 * kMiB), &high = plain(5 * kMiB, 1);
  Device other(driver_, 1, 1);
  for (uint64_t number = 0; number < 20; ++number) {
    device_->submit(job(1, number, {&low}, mixed_copies()));
    other.submit(job(2, number, {&high}, mixed_copies()));
    const auto one = outcome(1, number), two = outcome(2, number);
    ASSERT_TRUE(one) << number << ": " << one.error().message;
    ASSERT_TRUE(two) << number << ": " << two.error().message;
    if (number % 5 == 0) until([&] { return fake_.count("streams") == 2; });
  }
  EXPECT_TRUE(holds(low, mixed_copies()));
  EXPECT_TRUE(holds(high, mixed_copies()));
}

TEST_F(DeviceTest, jobs_end_with_the_device) {
  const ClientMemory& memory = plain(5 * kMiB);
  for (uint64_t round = 0; round < 50; ++round) {
    start();
    for (uint64_t number = 0; number < 4; ++number) {
      auto one = job(round, number, {&memory}, many_copies());
      if (number == 1) one->ready = [](uint64_t begin, uint64_t) -> Result<bool> { return begin < 80'000; };
      device_->submit(std::move(one));
    }
    if (round % 2 == 0) {
      ASSERT_TRUE(outcome(round, 0));
    }
    device_.reset();
    for (uint64_t number = 0; number < 4; ++number) {
      ASSERT_EQ(done_count(round, number), 1) << "round " << round << " job " << number;
      const auto result = outcome(round, number);
      EXPECT_TRUE(result || result.error().code == Code::cancelled);
    }
  }
}

// ---- faults ----

// A function that fails from a call on: whether a job must fail then, and with what.
struct FaultCase {
  const char* name;
  bool is_needed;  // by the jobs below
};
void PrintTo(const FaultCase& one, std::ostream* out) { *out << one.name; }
constexpr FaultCase kFaultCases[] = {
    {"cuInit", false},
    {"cuDriverGetVersion", false},
    {"cuDeviceGetCount", false},
    {"cuDeviceGetUuid_v2", false},
    {"cuDevicePrimaryCtxRetain", true},
    {"cuDevicePrimaryCtxRelease_v2", false},
    {"cuCtxSetCurrent", true},
    {"cuCtxGetCurrent", true},
    {"cuPointerGetAttributes", true},
    {"cuMemHostRegister_v2", true},
    {"cuMemHostUnregister", false},
    {"cuStreamCreate", true},
    {"cuStreamDestroy_v2", false},
    {"cuStreamSynchronize", false},
    {"cuEventCreate", true},
    {"cuEventDestroy_v2", false},
    {"cuEventRecord", true},
    {"cuEventSynchronize", true},
    {"cuMemcpyHtoDAsync_v2", true},
    {"cuMemcpy2DAsync_v2", true},
    {"cuMemcpyBatchAsync_v2", true},
    {"cuIpcGetMemHandle", false},
    {"cuIpcOpenMemHandle_v2", true},
    {"cuIpcCloseMemHandle", false},
    {"cuMemRelease", false},
    {"cuMemRetainAllocationHandle", false},
    {"cuMemExportToShareableHandle", false},
    {"cuMemImportFromShareableHandle", true},
    {"cuMemAddressReserve", true},
    {"cuMemAddressFree", false},
    {"cuMemMap", true},
    {"cuMemUnmap", false},
    {"cuMemSetAccess", true},
};

class DeviceFaultTest : public DeviceTest, public testing::WithParamInterface<std::tuple<FaultCase, int>> {
 protected:
  // Four jobs at once, of two clients, to memory of both kinds; how many failed.
  int run_jobs(uint64_t round, const std::string& error_name) {
    std::vector<const ClientMemory*> memories;
    std::vector<std::vector<DeviceCopy>> copies;
    for (uint64_t number = 0; number < 4; ++number) {
      memories.push_back(number % 2 == 0 ? &plain(5 * kMiB) : &chunked(6 * kMiB));
      copies.push_back(number < 2 ? many_copies() : mixed_copies());
    }
    if (!error_name.empty()) fake_.fail(fault().c_str());
    for (uint64_t number = 0; number < 4; ++number)
      device_->submit(job(round + number % 2, number, {memories[number]}, copies[number]));
    int failed_count = 0;
    for (uint64_t number = 0; number < 4; ++number) {
      const auto result = outcome(round + number % 2, number);
      if (result) {
        EXPECT_TRUE(holds(*memories[number], copies[number])) << number;
        continue;
      }
      ++failed_count;
      EXPECT_NE(result.error().message.find(error_name), std::string::npos) << result.error().message;
      const bool written = !holds(*memories[number], {});
      EXPECT_TRUE(!written || result.error().target == TargetState::dirty) << number;
      after_failure_.emplace_back(memories[number], memories[number]->bytes());
    }
    fake_.fail("");
    return failed_count;
  }
  std::string fault() const { return base::text(std::get<0>(GetParam()).name, "=999@", std::get<1>(GetParam())); }
  std::vector<std::pair<const ClientMemory*, std::vector<std::byte>>> after_failure_;
};

TEST_P(DeviceFaultTest, jobs_end_once_with_the_drivers_error_nothing_is_left_and_the_next_work) {
  const auto& [fault_case, from] = GetParam();
  const int failed_count = run_jobs(1, "CUDA_ERROR_UNKNOWN");
  EXPECT_TRUE(failed_count > 0 || !fault_case.is_needed || from > 1);
  EXPECT_TRUE(failed_count == 0 || fault_case.is_needed);
  EXPECT_EQ(run_jobs(100, ""), 0);
  for (const auto& [memory, bytes] : after_failure_) EXPECT_EQ(memory->bytes(), bytes) << "written to after done";
  device_.reset();
  for (const auto& [key, outcome] : outcomes_) EXPECT_EQ(outcome.done_count, 1) << key.first << " " << key.second;
}

INSTANTIATE_TEST_SUITE_P(Functions, DeviceFaultTest,
                         testing::Combine(testing::ValuesIn(kFaultCases), testing::Values(1, 2, 6)),
                         [](const auto& chosen) {
                           return base::text(std::get<0>(chosen.param).name, "_from_call_", std::get<1>(chosen.param));
                         });

// Only where the driver cannot even name its errors is there but a number.
TEST_F(DeviceTest, an_error_without_a_name_is_a_number) {
  const ClientMemory& memory = plain(kMiB);
  fake_.fail("cuMemHostRegister_v2=999,cuGetErrorName=999");
  device_->submit(job(1, 1, {&memory}, many_copies(10)));
  const auto report = outcome(1, 1);
  ASSERT_FALSE(report);
  EXPECT_EQ(report.error().message, "register host memory with the GPU driver: CUDA error 999");
  fake_.fail("");
}

}  // namespace

}  // namespace tensord::gpu
