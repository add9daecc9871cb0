#include "memory/fill_map.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <thread>

namespace tensord::memory {

namespace {
Status go_on() { return {}; }

base::Fd descriptor_of(const FillMap& map) { return base::duplicate(map.fd()).value(); }
}  // namespace

TEST(FillMap, a_reader_sees_blocks_as_they_are_marked) {
  FillMap map = FillMap::create(130, 1300).value();
  const FillView view = FillView::open(descriptor_of(map)).value();
  EXPECT_FALSE(view.has_blocks(0, 1));
  map.mark_block(129, 10);
  EXPECT_TRUE(view.has_blocks(129, 130));
  EXPECT_FALSE(view.has_blocks(128, 130));
  EXPECT_EQ(view.ready_bytes(), 10u);
  EXPECT_EQ(view.total_bytes(), 1300u);
}

TEST(FillMap, a_waiting_reader_is_woken_by_the_last_block) {
  FillMap map = FillMap::create(2, 20).value();
  const FillView view = FillView::open(descriptor_of(map)).value();
  std::thread writer([&] {
    map.mark_block(1, 10);
    map.mark_block(0, 10);
  });
  EXPECT_TRUE(view.wait(0, 2, -1, go_on));
  writer.join();
}

TEST(FillMap, a_failed_load_gives_its_own_error_for_every_block) {
  FillMap map = FillMap::create(2, 20).value();
  const FillView view = FillView::open(descriptor_of(map)).value();
  map.mark_block(0, 10);
  map.end_failed(base::Error{base::Code::corrupt, std::string(5000, 'x')});
  EXPECT_EQ(view.wait(0, 1, -1, go_on).error().code, base::Code::corrupt);
  const Status failed = view.wait(0, 2, -1, go_on);
  ASSERT_FALSE(failed);
  EXPECT_EQ(failed.error().code, base::Code::corrupt);
  EXPECT_EQ(failed.error().message, std::string(sizeof(FillHeader::error_message) - 1, 'x'));
}

TEST(FillMap, waiting_ends_with_the_deadline_and_with_the_daemon) {
  FillMap map = FillMap::create(1, 10).value();
  const FillView view = FillView::open(descriptor_of(map)).value();
  EXPECT_EQ(view.wait(0, 1, 1, go_on).error().code, base::Code::unavailable);
  const Status orphaned = view.wait(0, 1, -1, [] { return base::fail(base::Code::unavailable, "gone"); });
  EXPECT_EQ(orphaned.error().message, "gone");
}

TEST(FillMap, the_artifact_id_is_there_once_ready) {
  FillMap map = FillMap::create(1, 10).value();
  const FillView view = FillView::open(descriptor_of(map)).value();
  tensor::Digest id;
  id.bytes.fill(std::byte{7});
  EXPECT_NE(view.artifact_id(), id);
  map.end_ready(id);
  EXPECT_EQ(view.artifact_id(), id);
  EXPECT_TRUE(view.has_blocks(0, 1));
}

TEST(FillMap, clients_cannot_write_to_it) {
  FillMap map = FillMap::create(1, 10).value();
  void* writable = ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, map.fd(), 0);
  EXPECT_EQ(writable, MAP_FAILED);
}

TEST(FillMap, other_files_are_refused) {
  base::Fd stranger(::memfd_create("stranger", MFD_CLOEXEC));
  EXPECT_EQ(FillView::open(stranger).error().code, base::Code::corrupt);
}

TEST(FillMap, a_void_one_is_ready_no_more) {
  FillMap map = FillMap::create(1, 10).value();
  map.end_ready({});
  const FillView view = FillView::open(descriptor_of(map)).value();
  map.void_it();
  EXPECT_EQ(view.state(), FillState::failed);
}

}  // namespace tensord::memory
