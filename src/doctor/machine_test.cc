#include "doctor/machine.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>

namespace tensord::doctor {

TEST(Machine, rates_are_read_back_where_they_were_written_and_nowhere_else) {
  std::string folder = "/tmp/tensord-machine-test-XXXXXX";
  ASSERT_NE(::mkdtemp(folder.data()), nullptr);
  EXPECT_FALSE(load_rates(folder, "this"));
  Rates rates;
  rates.bytes_per_s = {{"gather_all", 10e9}, {"disk_direct", 0}};
  ASSERT_TRUE(save_rates(folder, "this", rates));
  EXPECT_EQ(load_rates(folder, "this")->bytes_per_s, rates.bytes_per_s);
  EXPECT_EQ(load_rates(folder, "this")->of("gather_all"), 10e9);
  EXPECT_EQ(load_rates(folder, "this")->of("hash_1"), 0);
  EXPECT_FALSE(load_rates(folder, "another"));
  EXPECT_FALSE(save_rates(folder + "/none", "this", rates));
  for (const char* hostile :
       {"", "[]", "{}", "{\"machine\": 7}", "\xff{", "{\"machine\": \"this\", \"bytes_per_s\": []}",
        "{\"machine\": \"this\", \"bytes_per_s\": {\"a\": -1}}",
        "{\"machine\": \"this\", \"bytes_per_s\": {\"a\": 1e300}}",
        "{\"machine\": \"this\", \"bytes_per_s\": {\"a\": \"b\"}}"}) {
    std::ofstream(machine_file(folder)) << hostile;
    EXPECT_FALSE(load_rates(folder, "this")) << hostile;
  }
  std::filesystem::remove_all(folder);
}

}  // namespace tensord::doctor
