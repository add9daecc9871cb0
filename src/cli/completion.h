// Completion of words in shells. Their scripts ask the program itself: `tensord --complete WORD...`.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace CLI {
class App;
}

namespace tensord::cli {

// "bash", "zsh" or "fish" (CHECK).
std::string_view completion_script(std::string_view shell);

// What may stand for the last of `words`, the words after `tensord`: a line for each, its summary behind a tab;
// or one line "<files>": any file.
std::string completions(const CLI::App& program, const std::vector<std::string>& words);

}  // namespace tensord::cli
