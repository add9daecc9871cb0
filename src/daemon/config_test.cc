#include "daemon/config.h"

#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "base/bytes.h"
#include "daemon/machine.h"

namespace tensord::daemon {

namespace {

using base::Code;

// Settings of the environment that a test needs, and none that it inherited.
class ConfigTest : public testing::Test {
 protected:
  ConfigTest() {
    std::string name = "/tmp/tensord-config-test-XXXXXX";
    folder_ = ::mkdtemp(name.data());
    for (const Setting& setting : settings()) {
      std::string variable = "TENSORD_" + std::string(setting.name);
      for (char& c : variable) c = static_cast<char>(::toupper(c));
      ::unsetenv(variable.c_str());
    }
    ::setenv("TENSORD_CONFIG", (folder_ + "/tensord.toml").c_str(), 1);
    write_file("");
  }
  ~ConfigTest() override {
    std::filesystem::remove_all(folder_);
    ::unsetenv("TENSORD_HOST_MEMORY");
    ::unsetenv("TENSORD_CONFIG");
  }

  void write_file(const std::string& text) { std::ofstream(folder_ + "/tensord.toml") << text; }

  static base::Result<Config> configure(std::vector<std::string> arguments) {
    std::vector<char*> words;
    for (std::string& argument : arguments) words.push_back(argument.data());
    auto line = parse_command_line(words);
    if (!line) return base::pass_on(line);
    return make_config(*line);
  }

  std::string folder_;
};

}  // namespace

TEST_F(ConfigTest, a_flag_beats_the_environment_beats_the_file_beats_the_default) {
  EXPECT_EQ(configure({}).value().host_memory, default_host_memory());
  write_file("host_memory = \"1GiB\"\nread_threads = 3\n");
  EXPECT_EQ(configure({}).value().host_memory, base::kGiB);
  EXPECT_EQ(configure({}).value().read_threads, 3);
  ::setenv("TENSORD_HOST_MEMORY", "2GiB", 1);
  EXPECT_EQ(configure({}).value().host_memory, 2 * base::kGiB);
  EXPECT_EQ(configure({"--host-memory", "3GiB"}).value().host_memory, 3 * base::kGiB);
  EXPECT_EQ(configure({"--host-memory=4GiB"}).value().host_memory, 4 * base::kGiB);
}

TEST_F(ConfigTest, mistakes_are_told_with_the_place_they_stand_at) {
  const auto message = [](const base::Result<Config>& config) { return config ? "accepted" : config.error().message; };
  EXPECT_EQ(message(configure({"--host-memery", "1"})), "no flag '--host-memery'; see `tensord serve --help`");
  EXPECT_EQ(message(configure({"--host-memory"})), "--host-memory needs a value");
  EXPECT_EQ(message(configure({"--read-threads", "0"})), "--read-threads: '0' is no whole number from 1 to 256");
  EXPECT_EQ(message(configure({"--config", "/none"})), "--config /none: cannot be read");
  EXPECT_EQ(message(configure({"--config", "/"})), "--config /: cannot be read");
  ::setenv("TENSORD_CONFIG", "/none", 1);
  EXPECT_EQ(message(configure({})), "$TENSORD_CONFIG /none: cannot be read");
  ::setenv("TENSORD_CONFIG", (folder_ + "/tensord.toml").c_str(), 1);
  write_file("host_memory = \"1GiB\"\nhost_memery = 1\n");
  EXPECT_EQ(message(configure({})),
            folder_ + "/tensord.toml:2: host_memery: no such setting; see `tensord serve --help`");
  write_file("read_threads = [1]\n");
  EXPECT_EQ(message(configure({})), folder_ + "/tensord.toml:1: read_threads: write a string or a whole number");
  write_file("read_threads = \n");
  EXPECT_TRUE(message(configure({})).starts_with(folder_ + "/tensord.toml:")) << message(configure({}));
  write_file("");
  ::setenv("TENSORD_HOST_MEMORY", "lots", 1);
  EXPECT_EQ(message(configure({})),
            "$TENSORD_HOST_MEMORY: size 'lots': write a number with an optional unit, such as 8GiB or 512MiB");
}

TEST_F(ConfigTest, relative_folders_are_those_of_the_place_it_was_started_at) {
  const std::string here = std::filesystem::current_path().string();
  EXPECT_EQ(configure({"--state-dir", "state"}).value().state_dir, here + "/state");
  EXPECT_EQ(configure({}).value().log_file, "");
}

TEST_F(ConfigTest, the_default_memory_is_at_most_half_of_the_machine) {
  EXPECT_GT(default_host_memory(), 0u);
  EXPECT_LE(default_host_memory(),
            static_cast<uint64_t>(::sysconf(_SC_PHYS_PAGES)) * static_cast<uint64_t>(::sysconf(_SC_PAGESIZE)) / 2);
}

TEST_F(ConfigTest, help_names_every_setting) {
  for (const Setting& setting : settings()) {
    std::string flag = "--" + std::string(setting.name);
    std::replace(flag.begin(), flag.end(), '_', '-');
    EXPECT_NE(serve_help().find(flag), std::string::npos) << flag;
  }
}

}  // namespace tensord::daemon
