// From what a caller names to open files.
#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>

#include "base/text.h"
#include "client/model.h"
#include "tensor/safetensors.h"

namespace tensord::client {

using base::Code;
using base::fail;

namespace {

constexpr const char* kShardIndexName = "model.safetensors.index.json";
constexpr const char* kSingleName = "model.safetensors";
constexpr uint64_t kShardIndexBytesMax = 100'000'000;

// Absolute, with `.` and `..` left to the kernel; symbolic links stay as the caller wrote them.
Result<std::string> absolute(const std::string& path) {
  if (path.empty()) return fail(Code::invalid_argument, "open: an empty path");
  if (path.find('\0') != std::string::npos) return fail(Code::invalid_argument, "open: a path with a NUL byte");
  if (path[0] == '/') return path;
  char* folder = ::getcwd(nullptr, 0);
  if (folder == nullptr) return base::fail_errno(errno, "find the working folder");
  std::string whole = folder;
  std::free(folder);
  std::string_view rest = path;
  while (rest.starts_with("./")) rest.remove_prefix(2);
  return rest == "." ? whole : whole + "/" + std::string(rest);
}

// O_NONBLOCK: a FIFO must not make us wait for its writer.
Result<base::Fd> open_regular(const std::string& path) {
  base::Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
  if (!fd.valid()) return base::fail_errno(errno, "open ", path);
  TRY(base::identify_file(fd.get(), path));
  return fd;
}

// Opens one more file. Code::invalid_argument when it is one of those before.
Status add_file(Checkpoint& checkpoint, const std::string& path) {
  TRY_ASSIGN(base::Fd fd, open_regular(path));
  TRY_ASSIGN(const base::FileIdentity identity, base::identify_file(fd.get(), path));
  const auto& known = checkpoint.identities;
  if (const auto twin = std::find(known.begin(), known.end(), identity); twin != known.end()) {
    return fail(Code::invalid_argument, "open ", path, ": it is the same file as ",
                checkpoint.files[twin - known.begin()], ", named before");
  }
  checkpoint.files.push_back(path);
  checkpoint.fds.push_back(std::move(fd));
  checkpoint.identities.push_back(identity);
  return {};
}

bool is_folder(const std::string& path) {
  struct stat status;
  return ::stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode);
}

bool exists(const std::string& path) { return ::access(path.c_str(), F_OK) == 0; }

Result<Checkpoint> from_shard_index(const std::string& folder, const std::string& index_path,
                                    const std::string& shown) {
  Checkpoint checkpoint;
  checkpoint.path = shown;
  TRY_ASSIGN(const base::Fd index_file, open_regular(index_path));
  TRY_ASSIGN(const std::string json, base::read_file(index_file.get(), kShardIndexBytesMax, index_path));
  TRY_ASSIGN(tensor::ShardIndex shards, tensor::parse_shard_index(json, index_path));
  if (shards.files.empty()) return fail(Code::corrupt, index_path + ": the weight_map names no file");
  for (const std::string& name : shards.files) {
    if (const Status added = add_file(checkpoint, folder + "/" + name); !added)
      return fail(added.error().code, added.error().message, " (a shard that ", index_path, " names)");
  }
  checkpoint.shards = std::move(shards);
  return checkpoint;
}

Result<std::string> only_safetensors_in(const std::string& folder) {
  DIR* listing = ::opendir(folder.c_str());
  if (listing == nullptr) return base::fail_errno(errno, "list ", folder);
  std::vector<std::string> found;
  while (const dirent* entry = ::readdir(listing)) {
    const std::string_view name = entry->d_name;
    if (name.ends_with(".safetensors") && !name.starts_with(".")) found.emplace_back(name);
  }
  ::closedir(listing);
  if (found.size() == 1) return folder + "/" + found[0];
  if (found.empty()) {
    return fail(Code::not_found, folder, " holds neither ", kShardIndexName, " nor a .safetensors file");
  }
  return fail(Code::invalid_argument, folder, " holds ", found.size(), " .safetensors files and no ", kShardIndexName,
              "; name the files that belong together");
}

Result<Checkpoint> from_files(const std::vector<std::string>& paths, const std::string& shown) {
  Checkpoint checkpoint;
  checkpoint.path = shown;
  for (const std::string& path : paths) TRY(add_file(checkpoint, path));
  return checkpoint;
}

}  // namespace

Result<Checkpoint> find_checkpoint(const std::vector<std::string>& paths) {
  if (paths.empty()) return fail(Code::invalid_argument, "open: no path was given");
  std::vector<std::string> whole;
  for (const std::string& path : paths) {
    TRY_ASSIGN(std::string one, absolute(path));
    while (one.size() > 1 && one.back() == '/') one.pop_back();
    whole.push_back(std::move(one));
  }
  const std::string& first = whole.front();
  if (whole.size() > 1) return from_files(whole, first);
  if (!is_folder(first)) {
    if (first.ends_with(".index.json")) return from_shard_index(first.substr(0, first.rfind('/')), first, first);
    return from_files(whole, first);
  }
  const std::string index_path = first + "/" + kShardIndexName;
  if (exists(index_path)) return from_shard_index(first, index_path, first);
  if (exists(first + "/" + kSingleName)) return from_files({first + "/" + kSingleName}, first);
  TRY_ASSIGN(const std::string only, only_safetensors_in(first));
  return from_files({only}, first);
}

}  // namespace tensord::client
