// number: counts up with every record remembered, so the smallest are the oldest.
// Integers are the two's complement of unsigned ones; digests lie end to end, 16 bytes each.
#include "catalog/catalog.h"

#include <sqlite3.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <span>
#include <string_view>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "base/text.h"

namespace tensord::catalog {

using base::Code;
using base::Error;
using base::text;

namespace {

constexpr int64_t kSchemaVersion = 1;
// "TSND": whose file it is (sqlite.org/fileformat2.html, offset 68).
constexpr int64_t kApplicationId = 0x5453'4e44;

constexpr const char* kSchema = R"(
  CREATE TABLE files(
    number INTEGER PRIMARY KEY,
    device INTEGER NOT NULL,
    inode INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    path TEXT NOT NULL,
    layout_digest BLOB NOT NULL,
    leaves BLOB NOT NULL,
    UNIQUE(device, inode)) STRICT;
)";

constexpr const char* kReadSchema =
    "SELECT count(*), application_id, user_version FROM sqlite_schema, pragma_application_id, pragma_user_version";
constexpr const char* kFindFile =
    "SELECT path, layout_digest, leaves FROM files"
    " WHERE device = ?1 AND inode = ?2 AND size_bytes = ?3 AND mtime_ns = ?4";
constexpr const char* kInsertFile =
    "INSERT OR REPLACE INTO files(device, inode, size_bytes, mtime_ns, path, layout_digest, leaves)"
    " VALUES(?1, ?2, ?3, ?4, ?5, ?6, ?7)";
constexpr const char* kForgetFiles =
    "DELETE FROM files WHERE number <= (SELECT number FROM files ORDER BY number DESC LIMIT 1 OFFSET ?1)";

struct Release {
  void operator()(sqlite3* database) const { sqlite3_close_v2(database); }
  void operator()(sqlite3_stmt* statement) const { sqlite3_finalize(statement); }
};

using CodeRow = std::pair<int, Code>;
constexpr CodeRow kCodes[] = {
    {SQLITE_FULL, Code::exhausted},   {SQLITE_NOMEM, Code::exhausted},    {SQLITE_TOOBIG, Code::exhausted},
    {SQLITE_PERM, Code::denied},      {SQLITE_AUTH, Code::denied},        {SQLITE_READONLY, Code::denied},
    {SQLITE_BUSY, Code::unavailable}, {SQLITE_LOCKED, Code::unavailable}, {SQLITE_PROTOCOL, Code::unavailable}};

Code code_of(int extended, int errno_value) {
  const int primary = extended & 0xff;
  if (primary == SQLITE_IOERR || primary == SQLITE_CANTOPEN) return base::errno_error("", errno_value).code;
  const auto row = std::ranges::find(kCodes, primary, &CodeRow::first);
  // Corrupt are also statements that fit no table: the schema is not the one of its version.
  return row != std::end(kCodes) ? row->second : Code::corrupt;
}

using HintRow = std::pair<Code, std::string_view>;
constexpr HintRow kHints[] = {{Code::exhausted, "; free space there"},
                              {Code::denied, "; it must be writable by this user"},
                              {Code::unavailable, "; another process may hold it"},
                              {Code::corrupt, "; it can be deleted, the next loads fill it again"}};

std::string_view hint_of(Code code) {
  const auto row = std::ranges::find(kHints, code, &HintRow::first);
  return row != std::end(kHints) ? row->second : "";
}

}  // namespace

// An open database and the words for its failures.
struct Connection {
  std::string path;
  std::unique_ptr<sqlite3, Release> database;

  tl::unexpected<Error> failed(std::string_view what, Code code, std::string_view why) const {
    return fail(code, text("catalog ", path, ": ", what, ": ", why, hint_of(code)));
  }
  tl::unexpected<Error> failed(std::string_view what) const {
    sqlite3* db = database.get();
    return failed(what, code_of(sqlite3_extended_errcode(db), sqlite3_system_errno(db)), sqlite3_errmsg(db));
  }
  Status execute(std::string_view what, const std::string& sql) const {
    if (sqlite3_exec(database.get(), sql.c_str(), nullptr, nullptr, nullptr) != SQLITE_OK) return failed(what);
    return {};
  }
  // All of what `work` does, or nothing.
  template <typename Work>
  Status transact(std::string_view what, Work work) const {
    TRY(execute(what, "BEGIN IMMEDIATE"));
    Status done = work();
    if (done) done = execute(what, "COMMIT");
    if (!done) sqlite3_exec(database.get(), "ROLLBACK", nullptr, nullptr, nullptr);
    return done;
  }
};

namespace {

// One run of a statement. `values` are bound to ?1, ?2, ...; they must stay until it ends.
class Query {
 public:
  template <typename... Values>
  Query(const Connection& connection, std::string_view what, const char* sql, const Values&... values)
      : connection_(connection), what_(what) {
    sqlite3_stmt* statement = nullptr;
    ready_ = sqlite3_prepare_v2(connection.database.get(), sql, -1, &statement, nullptr) == SQLITE_OK;
    statement_.reset(statement);
    ready_ = ready_ && (bind(values) && ...);
  }

  // True when there is a row. Failures of the constructor are told here.
  Result<bool> step() {
    const int code = ready_ ? sqlite3_step(statement_.get()) : SQLITE_ERROR;
    if (code != SQLITE_ROW && code != SQLITE_DONE) return connection_.failed(what_);
    return code == SQLITE_ROW;
  }
  Status run() {
    TRY(step());
    return {};
  }

  // Columns of the row, from 0. What is damaged becomes some number or text.
  int64_t integer(int column) const { return sqlite3_column_int64(statement_.get(), column); }
  std::string bytes(int column) const {
    const auto* data = static_cast<const char*>(sqlite3_column_blob(statement_.get(), column));
    return std::string(data != nullptr ? data : "",
                       static_cast<size_t>(sqlite3_column_bytes(statement_.get(), column)));
  }
  tl::unexpected<Error> damaged() const { return connection_.failed(what_, Code::corrupt, "the record is damaged"); }
  // Code::corrupt where they are no whole ones.
  Result<std::vector<tensor::Digest>> digests(int column) const {
    const std::string raw = bytes(column);
    std::vector<tensor::Digest> out(raw.size() / sizeof(tensor::Digest));
    if (sqlite3_column_type(statement_.get(), column) != SQLITE_BLOB || out.size() * sizeof out[0] != raw.size())
      return damaged();
    if (!out.empty()) std::memcpy(out.data(), raw.data(), raw.size());
    return out;
  }

 private:
  bool bind(uint64_t value) {
    return bound(sqlite3_bind_int64(statement_.get(), ++bound_count_, static_cast<int64_t>(value)));
  }
  bool bind(const std::string& value) {
    return bound(
        sqlite3_bind_text64(statement_.get(), ++bound_count_, value.data(), value.size(), SQLITE_STATIC, SQLITE_UTF8));
  }
  bool bind(std::span<const tensor::Digest> values) {
    const void* data = values.empty() ? "" : static_cast<const void*>(values.data());  // else it would become NULL
    return bound(sqlite3_bind_blob64(statement_.get(), ++bound_count_, data, values.size_bytes(), SQLITE_STATIC));
  }
  bool bind(const base::FileIdentity& file) {
    return bind(file.device) && bind(file.inode) && bind(file.size_bytes) && bind(static_cast<uint64_t>(file.mtime_ns));
  }
  static bool bound(int code) {
    CHECK(code != SQLITE_RANGE && code != SQLITE_MISUSE);
    return code == SQLITE_OK;
  }

  const Connection& connection_;
  const std::string_view what_;
  std::unique_ptr<sqlite3_stmt, Release> statement_;
  int bound_count_ = 0;
  bool ready_ = false;
};

// Writes the schema into an empty database and refuses one that is not ours.
Status adopt(const Connection& connection) {
  constexpr std::string_view kWhat = "open";
  constexpr std::string_view kRead = "read the schema";
  int64_t table_count = 0, application = 0, version = 0;
  {
    Query query(connection, kRead, kReadSchema);
    TRY(query.run());
    table_count = query.integer(0), application = query.integer(1), version = query.integer(2);
  }
  if (table_count == 0) {
    return connection.execute("write the schema", text(kSchema, "PRAGMA application_id = ", kApplicationId,
                                                       "; PRAGMA user_version = ", kSchemaVersion));
  }
  if (application != kApplicationId) {
    return connection.failed(kWhat, Code::corrupt, "it is a database of another program");
  }
  if (version > kSchemaVersion) {
    return connection.failed(kWhat, Code::unsupported,
                             text("version ", version, " is of a newer tensord, this one knows ", kSchemaVersion,
                                  "; use that tensord or another state folder"));
  }
  if (version < kSchemaVersion) {
    return connection.failed(kWhat, Code::corrupt, text("there never was a version ", version));
  }
  return connection.execute(kRead, kFindFile);  // all columns are there
}

// A database may come with triggers and views of anyone's: none of them is run.
Status distrust(const Connection& connection) {
  for (const auto& [option, value] : {std::pair{SQLITE_DBCONFIG_DEFENSIVE, 1},
                                      {SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0},
                                      {SQLITE_DBCONFIG_ENABLE_TRIGGER, 0},
                                      {SQLITE_DBCONFIG_ENABLE_VIEW, 0}}) {
    CHECK(sqlite3_db_config(connection.database.get(), option, value, nullptr) == SQLITE_OK);
  }
  return connection.execute("set up", "PRAGMA cell_size_check = ON");
}

// While another process opens a fresh file this fails at once instead of waiting (SQLite cannot wait for a
// stronger lock while it holds a weaker one), so the waiting is done here.
Status use_wal(const Connection& connection, int busy_timeout_ms) {
  std::string mode;
  for (int waited_ms = 0;; ++waited_ms) {
    Query query(connection, "set up", "PRAGMA journal_mode = WAL");
    const Status set = query.run();
    mode = query.bytes(0);
    if (set) break;
    if (set.error().code != Code::unavailable || waited_ms >= busy_timeout_ms) return set;
    sqlite3_sleep(1);
  }
  if (mode != "wal" && connection.path != Catalog::kInMemory) {
    base::log(base::LogLevel::warning, "the catalog ", connection.path, " stays in journal mode ", mode,
              ": its file system has no shared memory");
  }
  return connection.execute("set up", "PRAGMA synchronous = NORMAL");
}

}  // namespace

Catalog::Catalog(std::unique_ptr<Connection> connection, size_t file_count_max)
    : connection_(std::move(connection)), file_count_max_(file_count_max) {}

Catalog::~Catalog() = default;

Result<std::unique_ptr<Catalog>> Catalog::open(const std::string& path, const CatalogOptions& options) {
  // Made before SQLite would make it readable for others. Not opened: a close would drop the locks that this
  // process holds on it (sqlite.org/howtocorrupt.html, 2.2).
  if (path != kInMemory && ::mknod(path.c_str(), S_IFREG | 0600, 0) != 0 && errno != EEXIST) {
    return tl::unexpected(base::errno_error(text("create the catalog ", path), errno));
  }
  constexpr int kFlags = SQLITE_OPEN_READWRITE | SQLITE_OPEN_NOMUTEX | SQLITE_OPEN_EXRESCODE;
  sqlite3* opened = nullptr;
  const int code = sqlite3_open_v2(path.c_str(), &opened, kFlags, nullptr);
  auto connection = std::make_unique<Connection>(Connection{path, decltype(Connection::database)(opened)});
  if (opened == nullptr) return fail(Code::exhausted, text("catalog ", path, ": ", sqlite3_errstr(code)));
  if (code != SQLITE_OK) return connection->failed("open");
  if (sqlite3_db_readonly(opened, "main") == 1) {
    return connection->failed("open", Code::denied, "it can only be read");
  }
  sqlite3_busy_timeout(opened, options.busy_timeout_ms);
  TRY(distrust(*connection));
  TRY(connection->transact("open", [&] { return adopt(*connection); }));  // another process may be at the same
  TRY(use_wal(*connection, options.busy_timeout_ms));
  return std::make_unique<Catalog>(std::move(connection), options.file_count_max);
}

Result<std::optional<FileRecord>> Catalog::find_file(const base::FileIdentity& identity) {
  Query query(*connection_, "find a file", kFindFile, identity);
  TRY_ASSIGN(const bool found, query.step());
  if (!found) return std::nullopt;
  FileRecord file{.identity = identity, .path = query.bytes(0)};
  TRY_ASSIGN(const std::vector<tensor::Digest> layout_digest, query.digests(1));
  TRY_ASSIGN(file.leaves, query.digests(2));
  if (layout_digest.size() != 1) return query.damaged();
  file.layout_digest = layout_digest[0];
  return file;
}

Status Catalog::remember(const std::vector<FileRecord>& files) {
  const std::string what = text("remember ", files.empty() ? "no files" : files.front().path);
  const auto run = [&](const char* sql, const auto&... values) {
    return Query(*connection_, what, sql, values...).run();
  };
  return connection_->transact(what, [&]() -> Status {
    for (const FileRecord& file : files) {
      TRY(run(kInsertFile, file.identity, file.path, std::span(&file.layout_digest, 1), std::span(file.leaves)));
    }
    return run(kForgetFiles, file_count_max_);
  });
}

}  // namespace tensord::catalog
