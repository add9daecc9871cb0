#include "rpc/unix_socket.h"

#include <fcntl.h>
#include <gtest/gtest.h>

#include <fstream>
#include <optional>

#include "rpc/rpc_testing.h"

namespace tensord::rpc {
namespace {

using base::Code;

// A variable of the environment, as it was afterwards.
class Variable {
 public:
  Variable(const char* name, const char* value) : name_(name) {
    if (const char* before = std::getenv(name)) before_ = before;
    value != nullptr ? ::setenv(name, value, 1) : ::unsetenv(name);
  }
  ~Variable() { before_ ? ::setenv(name_, before_->c_str(), 1) : ::unsetenv(name_); }

 private:
  const char* name_;
  std::optional<std::string> before_;
};

mode_t mode_of(const std::string& path) {
  struct stat status;
  return ::lstat(path.c_str(), &status) == 0 ? status.st_mode : 0;
}

TEST(UnixSocket, the_runtime_folder_follows_the_environment) {
  const Variable own("TENSORD_RUNTIME_DIR", nullptr);
  const Variable user("XDG_RUNTIME_DIR", nullptr);
  EXPECT_EQ(runtime_folder(), "/tmp/tensord-" + std::to_string(::geteuid()));
  const Variable with_user("XDG_RUNTIME_DIR", "/run/user/7/");
  EXPECT_EQ(runtime_folder(), "/run/user/7/tensord");
  const Variable with_own("TENSORD_RUNTIME_DIR", "/somewhere/else");
  EXPECT_EQ(socket_path(runtime_folder()), "/somewhere/else/socket");
}

TEST(UnixSocket, the_runtime_folder_is_made_closed_and_refused_when_it_is_open_to_others) {
  const TemporaryFolder folder;
  ASSERT_TRUE(prepare_runtime_folder(folder.path() + "/a/b"));
  EXPECT_EQ(mode_of(folder.path() + "/a/b"), mode_t{S_IFDIR | 0700});
  ASSERT_EQ(::chmod((folder.path() + "/a/b").c_str(), 0755), 0);
  EXPECT_EQ(prepare_runtime_folder(folder.path() + "/a/b/").error().code, Code::denied);
  EXPECT_EQ(mode_of(folder.path() + "/a/b"), mode_t{S_IFDIR | 0755});
}

TEST(UnixSocket, a_runtime_folder_that_is_a_link_is_denied) {
  const TemporaryFolder folder;
  const std::string link = folder.path() + "/link";
  std::filesystem::create_directory_symlink(folder.path(), link);
  for (const std::string& path : {link, link + "/"}) EXPECT_EQ(prepare_runtime_folder(path).error().code, Code::denied);
  EXPECT_EQ(connect_socket(socket_path(link)).error().code, Code::denied);
}

TEST(UnixSocket, a_runtime_folder_that_is_a_file_is_an_error) {
  const TemporaryFolder folder;
  std::ofstream(folder.path() + "/file") << "x";
  EXPECT_FALSE(prepare_runtime_folder(folder.path() + "/file"));
}

TEST(UnixSocket, a_runtime_folder_of_another_uid_is_denied) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can give a folder away";
  const TemporaryFolder folder;
  ASSERT_EQ(::chown(folder.path().c_str(), 12345, 12345), 0);
  const base::Error prepared = prepare_runtime_folder(folder.path()).error();
  EXPECT_EQ(prepared.code, Code::denied);
  EXPECT_EQ(prepared.message, "runtime folder " + folder.path() +
                                  " belongs to uid 12345, not to you (uid 0); remove it or set TENSORD_RUNTIME_DIR");
  EXPECT_EQ(connect_socket(socket_path(folder.path())).error().code, Code::denied);
}

TEST(UnixSocket, a_client_connects_to_a_listener_and_each_sees_the_other) {
  const TemporaryFolder folder;
  const Listener listener = Listener::open(folder.path()).value();
  EXPECT_EQ(listener.path(), folder.path() + "/socket");
  EXPECT_EQ(mode_of(listener.path()), mode_t{S_IFSOCK | 0600});
  const base::Fd client = connect_socket(listener.path()).value();
  EXPECT_EQ(::fcntl(client.get(), F_GETFD), FD_CLOEXEC);
  EXPECT_NE(::fcntl(client.get(), F_GETFL) & O_NONBLOCK, 0);
  const base::Fd accepted(::accept(listener.fd(), nullptr, nullptr));
  for (const base::Fd* end : {&client, &accepted}) {
    const Peer peer = peer_of(end->get()).value();
    EXPECT_EQ(peer.process_id, ::getpid());
    EXPECT_EQ(peer.user_id, ::geteuid());
  }
}

TEST(UnixSocket, the_second_listener_is_told_who_serves) {
  const TemporaryFolder folder;
  auto first = std::make_unique<Listener>(Listener::open(folder.path()).value());
  const auto second = Listener::open(folder.path());
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().code, Code::unavailable);
  EXPECT_EQ(second.error().message,
            "a daemon (pid " + std::to_string(::getpid()) + ") already serves " + folder.path());
  EXPECT_TRUE(connect_socket(first->path())) << "the refused one left the socket alone";
  first.reset();
  EXPECT_TRUE(Listener::open(folder.path()));
}

TEST(UnixSocket, a_closed_listener_leaves_no_socket_but_holds_the_lock) {
  const TemporaryFolder folder;
  Listener listener = Listener::open(folder.path()).value();
  const Listener moved = std::move(listener);
  EXPECT_TRUE(connect_socket(moved.path()));
  Listener last = Listener::open(folder.path() + "/other").value();
  last.close_socket();
  EXPECT_EQ(mode_of(last.path()), mode_t{0});
  EXPECT_EQ(connect_socket(last.path()).error().code, Code::unavailable);
  EXPECT_FALSE(Listener::open(folder.path() + "/other"));
}

TEST(UnixSocket, a_socket_left_by_a_dead_daemon_is_replaced) {
  const TemporaryFolder folder;
  {
    const Listener dead = Listener::open(folder.path()).value();
    ASSERT_EQ(::rename(dead.path().c_str(), (folder.path() + "/kept").c_str()), 0);
  }
  ASSERT_EQ(::rename((folder.path() + "/kept").c_str(), (folder.path() + "/socket").c_str()), 0);
  EXPECT_EQ(connect_socket(folder.path() + "/socket").error().code, Code::unavailable);
  const Listener listener = Listener::open(folder.path()).value();
  EXPECT_TRUE(connect_socket(listener.path()));
}

TEST(UnixSocket, nobody_there_is_unavailable) {
  const TemporaryFolder folder;
  EXPECT_EQ(connect_socket(folder.path() + "/socket").error().code, Code::unavailable);
  EXPECT_EQ(connect_socket(folder.path() + "/missing/socket").error().code, Code::unavailable);
}

TEST(UnixSocket, a_path_that_does_not_fit_an_address_is_named) {
  const TemporaryFolder folder;
  const std::string deep = folder.path() + "/" + std::string(100, 'd');
  const auto listener = Listener::open(deep);
  ASSERT_FALSE(listener);
  EXPECT_EQ(listener.error().code, Code::invalid_argument);
  EXPECT_NE(listener.error().message.find("set TENSORD_RUNTIME_DIR to a shorter folder"), std::string::npos);
  EXPECT_EQ(connect_socket(socket_path(deep)).error().code, Code::invalid_argument);
  const std::string fits = folder.path() + "/" + std::string(107 - folder.path().size() - 1 - 7, 'd');
  EXPECT_TRUE(Listener::open(fits)) << "107 bytes and the zero fill the address";
}

}  // namespace
}  // namespace tensord::rpc
