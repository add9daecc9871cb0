#include "cli/cli.h"

#include <gtest/gtest.h>
#include <CLI/CLI.hpp>

#include "base/bytes.h"
#include "base/text.h"
#include "cli/progress.h"
#include "cli/reports.h"
#include "cli/show.h"
#include "cli/table.h"
#include "cli/verbs.h"

namespace tensord::cli {

namespace {

constexpr const char* kServeHelp =
    "  --host-memory SIZE     most memory\n\nExample: tensord serve --host-memory 64GiB\n";

struct Ran {
  int status = 0;
  std::string out;
  std::string err;
};

Ran run(std::vector<std::string> words) {
  words.insert(words.begin(), "tensord");
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  testing::internal::CaptureStdout();
  testing::internal::CaptureStderr();
  const int status = cli_main(static_cast<int>(argv.size()), argv.data(), kServeHelp);
  return {status, testing::internal::GetCapturedStdout(), testing::internal::GetCapturedStderr()};
}

const CLI::App& program() {
  static Words words;
  static const auto made = make_program(words, kServeHelp);
  return *made;
}

// Two files: a [4, 6] and b [3] in the first, c [2] of an unknown type in the second.
tensor::Index two_files() {
  tensor::Index index;
  index.files = {{.path = "/m/one.safetensors", .size_bytes = 1060},
                 {.path = "/m/two.safetensors", .size_bytes = 520}};
  index.tensors = {
      {.name = "a",
       .dtype = tensor::Dtype::f16,
       .dtype_text = "F16",
       .shape = {4, 6},
       .offset = 1000,
       .size_bytes = 48},
      {.name = "b",
       .dtype = tensor::Dtype::f32,
       .dtype_text = "F32",
       .shape = {3},
       .offset = 1048,
       .size_bytes = 12},
      {.name = "c", .dtype_text = "Q5", .shape = {2}, .file = 1, .offset = 500, .size_bytes = 20},
  };
  index.metadata = {{"format", "pt"}};
  return index;
}

constexpr const char* kExplained =
    R"({"load": 3, "replica": 1, "path": "/m", "artifact": null, "state": "ready",
 "error": null, "wall_ns": 500000000, "bytes": 2147483648, "gb_per_s": 4.29, "read_threads": 2, "disk_bytes": 0,
 "cached_bytes": 1073741824, "direct_bytes": 1073741824, "buffered_bytes": 0, "read_path": "io_uring, O_DIRECT",
 "notes": ["no huge pages"], "checked_against": "first_load",
 "served": "load", "origin_ns": 1000, "span_ns": 600000000, "moved_bytes": 2147483648, "moved_ns": 500000000,
 "achieved_gb_per_s": 4.29, "possible_gb_per_s": null, "possible_by": "", "rates_known": false, "phases": [
 {"lane": "daemon", "name": "index", "begin_ns": 0, "end_ns": 100000, "ns": 100000, "thread_ns": 100000, "bytes": 0},
 {"lane": "daemon", "name": "touch", "begin_ns": 0, "end_ns": 0, "ns": 0, "thread_ns": 0, "bytes": 0},
 {"lane": "daemon", "name": "read", "begin_ns": 60000000, "end_ns": 500000000, "ns": 396000000,
  "thread_ns": 792000000, "bytes": 2147483648, "gb_per_s": 5.42},
 {"lane": "daemon", "name": "check", "begin_ns": 60000000, "end_ns": 500000000, "ns": 44000000, "thread_ns": 88000000,
  "bytes": 2147483648, "gb_per_s": 48.8},
 {"lane": "python3 7", "name": "copy", "begin_ns": 450000000, "end_ns": 600000000, "ns": 75000000,
  "thread_ns": 150000000, "bytes": 1000000000, "gb_per_s": 13.33}],
 "limited_by": "page cache", "advice": "More threads may help.",
 "uses": [{"pid": 7, "name": "python3", "map_ns": 50000, "plan_ns": 3000, "wait_ns": 0, "copy_ns": 100000000,
           "copy_bytes": 1000000000, "record_count": 3, "thread_count": 2}],
 "trace": [{"name": "read", "thread": "read 0", "begin_ns": 1000, "end_ns": 3500, "bytes": 1048576, "block": 4}]})";

}  // namespace

TEST(CommandLine, every_verb_has_help_with_an_example_and_knows_json) {
  for (const CLI::App* verb : program().get_subcommands({})) {
    SCOPED_TRACE(verb->get_name());
    const Ran ran = run({verb->get_name(), "--help"});
    EXPECT_EQ(ran.status, kDone);
    EXPECT_NE(ran.out.find("\nExample: " + verb->get_footer() + "\n"), std::string::npos) << ran.out;
    EXPECT_EQ(verb->get_name() != "serve", ran.out.find("--json  ") != std::string::npos) << ran.out;
    EXPECT_EQ(run({"help", verb->get_name()}).out, ran.out);
  }
}

TEST(CommandLine, what_makes_no_sense_ends_with_2_and_says_why) {
  EXPECT_EQ(run({}).status, kUsage);
  const Ran verb = run({"laod"});
  EXPECT_EQ(verb.status, kUsage);
  EXPECT_EQ(verb.err, "tensord: there is no verb 'laod'; `tensord --help` says what is accepted\n");
  const Ran operand = run({"load"});
  EXPECT_EQ(operand.status, kUsage);
  EXPECT_EQ(operand.err, "tensord: load: PATH is required; `tensord load --help` says what is accepted\n");
  const Ran flag = run({"ls", "--wait"});
  EXPECT_EQ(flag.status, kUsage);
  EXPECT_EQ(flag.err.substr(0, 13), "tensord: ls: ");
  EXPECT_EQ(run({"show", "/m", "--view", "w[x]"}).status, kUsage);
  EXPECT_EQ(run({"load", "/m", "--progress", "sometimes"}).status, kUsage);
}

TEST(CommandLine, an_error_is_a_document_with_json) {
  const Ran ran = run({"load", "--json"});
  EXPECT_EQ(ran.status, kUsage);
  EXPECT_EQ(ran.out,
            "{\"error\":{\"code\":\"invalid_argument\",\"message\":\"PATH is required; `tensord load --help` "
            "says what is "
            "accepted\"}}\n");
  EXPECT_EQ(ran.err, "tensord: load: PATH is required; `tensord load --help` says what is accepted\n");
}

TEST(CommandLine, errors_have_the_exit_status_of_their_code) {
  EXPECT_EQ(exit_status(base::Code::not_found), kFailed);
  EXPECT_EQ(exit_status(base::Code::exhausted), kFailed);
  EXPECT_EQ(exit_status(base::Code::corrupt), kCorrupt);
  EXPECT_EQ(exit_status(base::Code::changed), kCorrupt);
  EXPECT_EQ(exit_status(base::Code::cancelled), kInterrupted);
}

TEST(Completion, every_shell_is_offered_every_verb_and_flag) {
  for (const char* shell : {"bash", "zsh", "fish"})
    EXPECT_NE(run({"completion", shell}).out.find("tensord --complete "), std::string::npos) << shell;
  EXPECT_EQ(run({"completion", "ksh"}).status, kUsage);
  const std::string verbs = run({"--complete", ""}).out;
  for (const CLI::App* verb : program().get_subcommands({})) {
    EXPECT_NE(verbs.find(verb->get_name() + "\t" + verb->get_description() + "\n"), std::string::npos);
    const std::string flags = run({"--complete", verb->get_name(), "-"}).out;
    for (const CLI::Option* flag : verb->get_options([](const auto* one) { return one->nonpositional(); })) {
      if (verb->get_name() == "serve") continue;  // its flags are the daemon's
      EXPECT_NE(flags.find("--" + flag->get_lnames().front() + "\t" + flag->get_description() + "\n"),
                std::string::npos)
          << flags;
    }
  }
}

TEST(Completion, the_word_before_decides_and_the_word_itself_selects) {
  const auto offered = [](std::vector<std::string> words) {
    words.insert(words.begin(), "--complete");
    return run(words).out;
  };
  EXPECT_EQ(offered({"un"}), "unpin\tlet a replica be evicted again\n");
  EXPECT_EQ(offered({"--ver"}), "--version\tprint the version\n");
  EXPECT_EQ(offered({"load", "--progress", "a"}), "auto\nalways\n");
  EXPECT_EQ(offered({"load", "--wait", "m"}), "<files>\n");
  EXPECT_EQ(offered({"load", "--only", ""}), "");
  EXPECT_EQ(offered({"explain", "--trace", "t"}), "<files>\n");
  EXPECT_EQ(offered({"completion", "f"}), "fish\n");
  EXPECT_EQ(offered({"serve", "--host"}), "--host-memory\tmost memory\n");
  EXPECT_EQ(offered({"ls", "x"}), "");
  EXPECT_EQ(offered({"laod", "-"}), "");
}

TEST(Table, columns_are_aligned_and_lines_end_with_their_last_word) {
  Table table({{"name"}, {"size", Align::right}, {"note"}});
  table.add({"w", "12 B", ""});
  table.add({"gewölbe", "3 B", "x"});
  EXPECT_EQ(table.text(),
            "name     size  note\n"
            "w        12 B\n"
            "gewölbe   3 B  x\n");
}

TEST(Table, durations_have_the_unit_that_fits) {
  EXPECT_EQ(human_ns(999), "999 ns");
  EXPECT_EQ(human_ns(1'500), "1.5 us");
  EXPECT_EQ(human_ns(1'500'000), "1.50 ms");
  EXPECT_EQ(human_ns(2'340'000'000), "2.34 s");
  EXPECT_EQ(human_ns(62'000'000'000), "1 min 2 s");
  EXPECT_EQ(human_ns(7'260'000'000'000), "2 h 1 min");
}

TEST(Table, bars_are_clipped) {
  EXPECT_EQ(bar(0.5, 4), "##..");
  EXPECT_EQ(bar(7, 4), "####");
  EXPECT_EQ(bar(-1, 4), "....");
  EXPECT_EQ(bar(0.0 / 0.0, 4), "....");
}

TEST(Progress, a_line_tells_share_bytes_rate_and_the_time_left) {
  constexpr uint64_t kGiB = base::kGiB;
  const FillProgress half{.ready_bytes = kGiB, .total_bytes = 2 * kGiB, .elapsed_ns = 500'000'000};
  EXPECT_EQ(progress_line(half, 73),
            "[##########..........]  50 %  1.00 GiB of 2.00 GiB  2.15 GB/s  0.5 s left");
  const FillProgress done{.ready_bytes = 2 * kGiB, .total_bytes = 2 * kGiB, .elapsed_ns = 1'000'000'000};
  EXPECT_EQ(progress_line(done, 73),
            "[####################]  100 %  2.00 GiB of 2.00 GiB  2.15 GB/s  in 1.00 s");
}

TEST(Progress, a_line_counts_only_what_it_saw_and_fits_narrow_terminals) {
  const FillProgress resident{.ready_bytes = 100, .total_bytes = 100, .begin_bytes = 100, .elapsed_ns = 5};
  EXPECT_EQ(progress_line(resident, 80), "[########################################]  100 %  100 B of 100 B");
  EXPECT_EQ(progress_line(resident, 20), "100 %  100 B of 100 ");
  EXPECT_EQ(progress_line({}, 20), "100 %  0 B of 0 B");
}

TEST(Explain, draws_a_waterfall_over_one_time_axis) {
  EXPECT_EQ(explain_text(kExplained).value(),
            "load 3 of /m: ready\n"
            "2.00 GiB in 500.00 ms, 4.29 GB/s\n"
            "what is possible here is not known: run `tensord doctor` once\n"
            "threads: 2; 1.00 GiB from the page cache, 1.00 GiB by io_uring, O_DIRECT\n"
            "the first load of these files: their digests were recorded\n"
            "no huge pages\n"
            "\n"
            "phase      0                              600.00 ms       time   GB/s\n"
            "index      #                                          100.0 us\n"
            "read           #############################         396.00 ms   5.42\n"
            "check          -----------------------------          44.00 ms  48.80\n"
            "python3 7\n"
            "  copy                                   ==========   75.00 ms  13.33\n"
            "\n"
            "limited by: page cache\nMore threads may help.\n");
  EXPECT_EQ(explain_text("{}").error().code, base::Code::internal);
}

TEST(Explain, says_what_is_possible_where_the_machine_was_measured) {
  std::string known = kExplained;
  known.replace(known.find("null, \"possible_by\": \"\""), 23, "5.5, \"possible_by\": \"disk\"");
  EXPECT_NE(explain_text(known).value().find("4.29 GB/s, of 5.50 GB/s that are possible here (disk)"),
            std::string::npos);
}

TEST(Explain, a_page_carries_the_report_and_no_name_ends_its_script) {
  std::string hostile = kExplained;
  hostile.replace(hostile.find("\"/m\""), 4, "\"</script><!--<b>\"");
  const std::string page = explain_page(hostile).value();
  EXPECT_EQ(page.find("</script><!--"), std::string::npos);
  EXPECT_NE(page.find("\\u003c/script>\\u003c!--\\u003cb>"), std::string::npos);
  EXPECT_EQ(page.find("@report@"), std::string::npos);
  EXPECT_EQ(page.find("\"trace\":"), std::string::npos);  // spans stay out of it
}

TEST(Explain, phases_and_spans_become_a_chrome_trace_with_a_track_for_each) {
  std::string one_phase = kExplained;
  const size_t second = one_phase.find(",\n {\"lane\": \"daemon\", \"name\": \"touch\"");
  one_phase.erase(second, one_phase.find("],\n \"limited_by\"") - second);
  EXPECT_EQ(
      chrome_trace(one_phase).value(),
      R"({"displayTimeUnit":"ms","traceEvents":[)"
      R"({"args":{"name":"daemon: index"},"name":"thread_name","ph":"M","pid":1,"tid":1},)"
      R"({"args":{"bytes":0,"lane":"daemon","ns":100000,"thread_ns":100000},"dur":100.0,"name":"index","ph":"X",)"
      R"("pid":1,"tid":1,"ts":1.0},)"
      R"({"args":{"name":"read 0"},"name":"thread_name","ph":"M","pid":1,"tid":2},)"
      R"({"args":{"block":4,"bytes":1048576},"dur":2.5,"name":"read","ph":"X","pid":1,"tid":2,"ts":1.0}]})");
  EXPECT_EQ(chrome_trace("{}").error().code, base::Code::not_found);
}

TEST(Top, a_look_has_rates_since_the_one_before_and_the_time_that_is_left) {
  const auto status = [](int loaded) {
    return base::text(R"({"pid": 1, "memory": {"in_use": 4096, "kept": 0}, "limits": {"host_memory": 8192},
      "replicas": 1, "connections": 1, "loads_running": 1, "disk_bytes": 0, "loaded_bytes": )",
                      loaded, "}");
  };
  const auto list = [](int ready) {
    return base::text(R"({"replicas": [{"replica": 1, "path": "/m", "artifact": null, "state": "filling",
      "error": null, "payload_bytes": 9, "memory_bytes": 4096, "total_bytes": 4000, "tensor_count": 1, "files": [],
      "pinned": false, "leases": [], "idle_s": 0, "ready_bytes": )",
                      ready, "}]}");
  };
  const std::string first = take_look(status(1000), list(1000), "", 10).value();
  const std::string look = take_look(status(3000), list(3000), first, 12).value();
  EXPECT_NE(look.find("\"loaded_bytes_per_s\":1000.0"), std::string::npos) << look;
  EXPECT_NE(look.find("\"bytes_per_s\":1000.0"), std::string::npos) << look;
  const LookText shown = look_text(look).value();
  EXPECT_EQ(shown.line,
            "1 replica, 1 load, 1 client, memory 4.00 KiB in use + 0 B kept of 8.00 KiB, loading 0.00 GB/s, "
            "disk 0.00 GB/s\n");
  EXPECT_NE(shown.screen.find("]  75 %  2.93 KiB of 3.91 KiB  0.00 GB/s  1.0 s left  /m\n"),
            std::string::npos)
      << shown.screen;
  EXPECT_EQ(look_text("{}").error().code, base::Code::internal);
  EXPECT_EQ(take_look("{}", "{}", "", 1).error().code, base::Code::internal);
}

TEST(Reports, an_answer_that_is_none_is_an_error) {
  for (const char* report : {"", "[", "{}", "{\"replicas\": 7}", "{\"replicas\": [{}]}"}) {
    EXPECT_EQ(status_text(report).error().code, base::Code::internal) << report;
    EXPECT_EQ(list_text(report).error().code, base::Code::internal) << report;
    EXPECT_EQ(verify_text(report).error().code, base::Code::internal) << report;
  }
}

TEST(Reports, a_list_tells_who_holds_what) {
  EXPECT_EQ(list_text(R"({"replicas": [
      {"replica": 1, "path": "/m/a", "artifact": "0123456789abcdef0123456789abcdef", "state": "ready", "error": null,
       "payload_bytes": 1024, "memory_bytes": 4096, "ready_bytes": 1024, "total_bytes": 1024, "tensor_count": 3,
       "files": [], "pinned": true, "idle_s": 0,
       "leases": [{"pid": 7, "name": "python3", "held_s": 2}, {"pid": 7, "name": "python3", "held_s": 1}]},
      {"replica": 12, "path": "/m/b", "artifact": null, "state": "filling", "error": null, "payload_bytes": 1000,
       "memory_bytes": 4096, "ready_bytes": 250, "total_bytes": 1000, "tensor_count": 1, "files": [], "pinned": false,
       "idle_s": 61.5, "leases": []},
      {"replica": 13, "path": "/m/c", "artifact": null, "state": "failed", "memory_bytes": 0, "pinned": false, "idle_s": 1,
       "error": {"code": "changed", "message": "read /m/c: it grew"}, "leases": []}]})")
                .value(),
            "replica  state             size  tensors  artifact      held by                path\n"
            "      1  ready         1.00 KiB        3  0123456789ab  pinned, python3 7 (2)  /m/a\n"
            "     12  filling 25 %    1000 B        1  -             - (idle 1 min 1 s)     /m/b\n"
            "     13  failed             0 B        0  -             - (idle 1.00 s)        /m/c\n"
            "replica 13 failed: read /m/c: it grew\n");
}

TEST(Reports, verify_names_file_tensor_and_block) {
  const Verified verified = verify_text(R"({"replica": 1, "path": "/m", "artifact": "00", "leaf_count": 9,
      "bytes": 1000000, "ns": 1000000, "faults": [{"file": "/m/x.safetensors", "tensor": "w", "leaf": 2,
      "offset": 2097152, "size_bytes": 1048576}]})")
                                .value();
  EXPECT_FALSE(verified.sound);
  EXPECT_EQ(verified.text,
            "/m/x.safetensors: tensor 'w', block 2 (1048576 B at 2097152): not what was loaded first\n"
            "/m: 1 corrupt block; 9 blocks, 976.56 KiB checked in 1.00 ms, 1.00 GB/s\n");
}

TEST(Show, an_index_is_a_table_of_tensors_and_files) {
  EXPECT_EQ(show_index(two_files(), "/m").text,
            "/m: 3 tensors, 80 B\n"
            "\n"
            "tensor  dtype  shape   size  file\n"
            "a       F16    [4, 6]  48 B     0\n"
            "b       F32    [3]     12 B     0\n"
            "c       Q5     [2]     20 B     1\n"
            "\n"
            "file      size  path\n"
            "   0  1.04 KiB  /m/one.safetensors\n"
            "   1     520 B  /m/two.safetensors\n"
            "metadata  'format' = 'pt'\n");
}

TEST(Show, a_view_is_the_plan_of_a_packed_copy) {
  EXPECT_EQ(show_views(two_files(), "/m", {"a[:, 0:3]", "b"}).value().text,
            "view       dtype  shape   size  of the tensor  at\n"
            "a[:, 0:3]  F16    [4, 3]  24 B         50.0 %   0\n"
            "b          F32    [3]     12 B        100.0 %  24\n"
            "\n"
            "plan of a packed copy: 40 B in 3 records (source offset -> target offset; s1: is file 1)\n"
            "1000 pitch 12 -> 0 pitch 6   4 rows x 6 B\n"
            "1048 -> 24   1 row x 12 B\n"
            "fill -> 36   1 row x 4 B\n"
            "\n"
            "file      size  path\n"
            "   0  1.04 KiB  /m/one.safetensors\n"
            "   1     520 B  /m/two.safetensors\n");
}

TEST(Show, a_view_of_what_is_not_there_is_refused) {
  const base::Error missing = show_views(two_files(), "/m", {"z"}).error();
  EXPECT_EQ(missing.code, base::Code::not_found);
  EXPECT_EQ(missing.message, "there is no tensor 'z'; `tensord show PATH` lists all 3");
  EXPECT_EQ(show_views(two_files(), "/m", {"a[9]"}).error().code, base::Code::invalid_argument);
}

}  // namespace tensord::cli
