#include "rpc/frame.h"

#include <fcntl.h>
#include <gtest/gtest.h>

#include <cstring>
#include <thread>

#include "rpc/rpc_testing.h"

namespace tensord::rpc {
namespace {

using base::Code;

constexpr int64_t kTestTimeoutMs = 60'000;

void send_words(int socket, std::vector<uint32_t> words) {
  const size_t size_bytes = words.size() * sizeof(uint32_t);
  ASSERT_EQ(::send(socket, words.data(), size_bytes, MSG_NOSIGNAL), static_cast<ssize_t>(size_bytes));
}

std::vector<std::byte> encoded(const Frame& frame) {
  std::vector<std::byte> bytes;
  append_frame(frame, bytes);
  return bytes;
}

// What a reader says to what lies in the socket.
base::Error error_of(int socket) {
  FrameReader reader;
  if (auto received = reader.read_from(socket); !received) return received.error();
  auto frame = reader.next();
  if (!frame) return frame.error();
  auto received = reader.read_from(socket);
  return received ? base::Error{Code::internal, "no error"} : received.error();
}

TEST(Frame, bytes_and_descriptors_arrive_in_order) {
  const auto [near, far] = socket_pair();
  FrameWriter writer;
  std::vector<uint64_t> inodes;
  for (size_t at = 0; at < 40; ++at) {
    Frame frame{bytes_of(std::string(at * 7, 'a')), {}};
    for (size_t fd = 0; fd < at % 4; ++fd) {
      base::Pipe pipe = base::make_pipe().value();
      inodes.push_back(inode_of(pipe.read_end.get()));
      frame.fds.push_back(std::move(pipe.read_end));
    }
    writer.push(std::move(frame));
  }
  ASSERT_TRUE(writer.write_to(near.get()).value());
  EXPECT_EQ(writer.pending_bytes(), 0u);
  EXPECT_EQ(writer.pending_fds(), 0u);

  FrameReader reader;
  size_t fd_at = 0;
  for (size_t at = 0; at < 40; ++at) {
    const Frame frame = receive_frame(far.get(), reader, kTestTimeoutMs).value();
    EXPECT_EQ(frame.bytes, bytes_of(std::string(at * 7, 'a')));
    ASSERT_EQ(frame.fds.size(), at % 4);
    for (const base::Fd& fd : frame.fds) {
      EXPECT_EQ(inode_of(fd.get()), inodes[fd_at++]);
      EXPECT_EQ(::fcntl(fd.get(), F_GETFD), FD_CLOEXEC);
    }
  }
  EXPECT_FALSE(reader.is_partial());
}

TEST(Frame, a_small_frame_takes_one_read) {
  const auto [near, far] = socket_pair();
  ASSERT_TRUE(send_frame(near.get(), {bytes_of("words"), {}}, kTestTimeoutMs));
  FrameReader reader;
  ASSERT_TRUE(reader.read_from(far.get()));
  EXPECT_EQ(reader.next().value()->bytes, bytes_of("words"));
}

TEST(Frame, six_hundred_descriptors_pass_through_a_small_buffer) {
  const auto [near, far] = socket_pair();
  const int small = 4096;
  ASSERT_EQ(::setsockopt(near.get(), SOL_SOCKET, SO_SNDBUF, &small, sizeof small), 0);
  const base::Pipe pipe = base::make_pipe().value();
  Frame frame{std::vector<std::byte>(100'000, std::byte{7}), {}};
  for (size_t at = 0; at < 600; ++at) frame.fds.push_back(base::duplicate(pipe.read_end.get()).value());

  Status sent;
  std::thread sender([&, socket = near.get()] { sent = send_frame(socket, std::move(frame), kTestTimeoutMs); });
  FrameReader reader;
  const auto received = receive_frame(far.get(), reader, kTestTimeoutMs);
  sender.join();
  ASSERT_TRUE(sent) << sent.error().message;
  ASSERT_TRUE(received) << received.error().message;
  EXPECT_EQ(received->bytes, std::vector<std::byte>(100'000, std::byte{7}));
  ASSERT_EQ(received->fds.size(), 600u);
  for (const base::Fd& fd : received->fds) ASSERT_EQ(inode_of(fd.get()), inode_of(pipe.read_end.get()));
}

TEST(Frame, the_most_descriptors_pass_with_no_bytes_at_all) {
  const auto [near, far] = socket_pair();
  const base::Pipe pipe = base::make_pipe().value();
  Frame frame;
  for (size_t at = 0; at < kFrameFdsMax; ++at) frame.fds.push_back(base::duplicate(pipe.read_end.get()).value());
  Status sent;
  std::thread sender([&, socket = near.get()] { sent = send_frame(socket, std::move(frame), kTestTimeoutMs); });
  FrameReader reader;
  const auto received = receive_frame(far.get(), reader, kTestTimeoutMs);
  sender.join();
  ASSERT_TRUE(received) << received.error().message;
  EXPECT_EQ(received->fds.size(), kFrameFdsMax);
}

TEST(Frame, ten_megabytes_pass) {
  const auto [near, far] = socket_pair();
  std::vector<std::byte> bytes(10 << 20);
  for (size_t at = 0; at < bytes.size(); ++at) bytes[at] = static_cast<std::byte>(at * 31 >> 3);
  std::thread sender([&, socket = near.get()] {
    EXPECT_TRUE(send_frame(socket, {bytes, {}}, kTestTimeoutMs));
    EXPECT_TRUE(send_frame(socket, {bytes_of("after it"), {}}, kTestTimeoutMs));
  });
  FrameReader reader;
  const auto received = receive_frame(far.get(), reader, kTestTimeoutMs);
  EXPECT_EQ(receive_frame(far.get(), reader, kTestTimeoutMs).value().bytes, bytes_of("after it"));
  sender.join();
  EXPECT_TRUE(received && received->bytes == bytes);
}

TEST(Frame, single_bytes_make_whole_frames) {
  const auto [near, far] = socket_pair();
  FrameReader reader;
  const std::vector<std::byte> bytes = encoded({bytes_of("slow"), {}});
  for (const std::byte byte : bytes) {
    EXPECT_FALSE(reader.next().value());
    ASSERT_EQ(::send(near.get(), &byte, 1, MSG_NOSIGNAL), 1);
    ASSERT_TRUE(reader.read_from(far.get()));
    EXPECT_TRUE(reader.is_partial());
  }
  EXPECT_EQ(reader.next().value()->bytes, bytes_of("slow"));
  EXPECT_FALSE(reader.is_partial());
}

TEST(Frame, descriptors_after_another_frame_in_one_read_are_of_the_later_frame) {
  const auto [near, far] = socket_pair();
  const base::Pipe pipe = base::make_pipe().value();
  ASSERT_TRUE(send_frame(near.get(), {bytes_of("none"), {}}, kTestTimeoutMs));
  Frame second{bytes_of("one"), {}};
  second.fds.push_back(base::duplicate(pipe.read_end.get()).value());
  ASSERT_TRUE(send_frame(near.get(), std::move(second), kTestTimeoutMs));
  FrameReader reader;
  EXPECT_EQ(receive_frame(far.get(), reader, kTestTimeoutMs).value().fds.size(), 0u);
  EXPECT_EQ(receive_frame(far.get(), reader, kTestTimeoutMs).value().fds.size(), 1u);
}

TEST(Frame, wrong_headers_are_corrupt) {
  const std::vector<std::pair<std::vector<uint32_t>, std::string>> cases = {
      {{0x20544547, 0, 0, 0}, "these bytes are not a frame of tensord's protocol"},
      {{kFrameMagic, 0, 0, 1}, "these bytes are not a frame of tensord's protocol"},
      {{kFrameMagic, kFrameBytesMax + 1, 0, 0}, "a frame of 67108865 bytes, at most 67108864 are allowed"},
      {{kFrameMagic, 0xffffffff, 0, 0}, "a frame of 4294967295 bytes, at most 67108864 are allowed"},
      {{kFrameMagic, 8, kFrameFdsMax + 1, 0}, "a frame of 2049 descriptors, at most 2048 are allowed"},
  };
  for (const auto& [words, message] : cases) {
    const auto [near, far] = socket_pair();
    send_words(near.get(), words);
    const base::Error error = error_of(far.get());
    EXPECT_EQ(error.code, Code::corrupt);
    EXPECT_EQ(error.message, message);
  }
}

TEST(Frame, a_wrong_number_of_descriptors_is_corrupt_and_all_are_closed) {
  for (const uint32_t announced : {0u, 1u, 3u}) {
    const auto [near, far] = socket_pair();
    base::Pipe pipe = base::make_pipe().value();
    std::vector<std::byte> bytes = encoded({bytes_of("x"), {}});
    std::memcpy(bytes.data() + 8, &announced, sizeof announced);
    send_fds(near.get(), bytes, pipe.write_end.get(), 2);
    pipe.write_end.reset();
    FrameReader reader;
    ASSERT_TRUE(reader.read_from(far.get()));
    const auto frame = reader.next();
    ASSERT_FALSE(frame);
    EXPECT_EQ(frame.error().message, "a frame with 2 descriptors, " + std::to_string(announced) + " were announced");
    EXPECT_TRUE(write_end_is_closed(pipe));
  }
}

TEST(Frame, descriptors_over_the_limit_of_a_frame_are_corrupt_and_closed) {
  const auto [near, far] = socket_pair();
  base::Pipe pipe = base::make_pipe().value();
  FrameReader reader;
  send_words(near.get(), {kFrameMagic, 100, 0, 0});
  Status received = reader.read_from(far.get());
  for (size_t count = 0; received; count += 250) {
    ASSERT_LE(count, kFrameFdsMax);
    EXPECT_FALSE(reader.next().value());
    send_fds(near.get(), {std::byte{1}}, pipe.write_end.get(), 250);
    received = reader.read_from(far.get());
  }
  EXPECT_EQ(received.error().code, Code::corrupt);
  pipe.write_end.reset();
  EXPECT_TRUE(write_end_is_closed(pipe));
}

TEST(Frame, descriptors_that_find_no_room_are_exhausted_and_closed) {
  const auto [near, far] = socket_pair();
  base::Pipe pipe = base::make_pipe().value();
  Frame frame{bytes_of("x"), {}};
  for (int at = 0; at < 3; ++at) frame.fds.push_back(base::duplicate(pipe.write_end.get()).value());
  ASSERT_TRUE(send_frame(near.get(), std::move(frame), kTestTimeoutMs));
  pipe.write_end.reset();
  FrameReader reader;
  {
    NoDescriptorsLeft full;
    full.give_one_back();
    const Status received = reader.read_from(far.get());
    ASSERT_FALSE(received);
    EXPECT_EQ(received.error().code, Code::exhausted);
  }
  EXPECT_TRUE(write_end_is_closed(pipe));
}

TEST(Frame, a_close_in_the_middle_of_a_frame_is_told_from_one_between_frames) {
  for (const bool middle : {false, true}) {
    auto [near, far] = socket_pair();
    FrameReader reader;
    if (middle) send_words(near.get(), {kFrameMagic, 100, 0, 0, 1, 2, 3});
    near.reset();
    if (middle) {
      ASSERT_TRUE(reader.read_from(far.get()));
    }
    EXPECT_FALSE(reader.next().value());
    const Status received = reader.read_from(far.get());
    ASSERT_FALSE(received);
    EXPECT_EQ(received.error().code, Code::unavailable);
    EXPECT_EQ(received.error().message,
              middle ? "the other side closed in the middle of a frame" : "the other side closed the connection");
  }
}

TEST(Frame, writing_to_a_closed_socket_is_unavailable_and_no_signal) {
  auto [near, far] = socket_pair();
  far.reset();
  const Status sent = send_frame(near.get(), {bytes_of("x"), {}}, kTestTimeoutMs);
  ASSERT_FALSE(sent);
  EXPECT_EQ(sent.error().code, Code::unavailable);
}

TEST(Frame, what_a_full_socket_does_not_take_stays_pending) {
  const auto [near, far] = socket_pair();
  FrameWriter writer;
  writer.push({std::vector<std::byte>(4 << 20), {}});
  EXPECT_FALSE(writer.write_to(near.get()).value());
  EXPECT_FALSE(writer.empty());
  EXPECT_GT(writer.pending_bytes(), 1u << 20);
  EXPECT_LT(writer.pending_bytes(), 4u << 20);
}

TEST(Frame, waiting_ends_with_the_deadline) {
  const auto [near, far] = socket_pair();
  FrameReader reader;
  EXPECT_EQ(receive_frame(far.get(), reader, 0).error().message, "the other side does not answer");
  const Status sent = send_frame(near.get(), {std::vector<std::byte>(4 << 20), {}}, 0);
  EXPECT_EQ(sent.error().message, "the other side does not take what is sent to it");
}

}  // namespace
}  // namespace tensord::rpc
