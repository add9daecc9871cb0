// number: counts up with every record remembered, so the smallest are the oldest.
// Integers are the two's complement of unsigned ones; digests lie end to end, 16 bytes each; identities are
// (device, inode, size_bytes, mtime_ns), 8 bytes each in the order of this machine, whose files they are.
#include "catalog/sqlite_catalog.h"

#include <sqlite3.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <span>
#include <string_view>
#include <type_traits>
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
constexpr uint64_t kApplicationId = 0x5453'4e44;

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
  CREATE TABLE artifacts(
    number INTEGER PRIMARY KEY,
    id BLOB NOT NULL UNIQUE,
    path TEXT NOT NULL,
    payload_bytes INTEGER NOT NULL,
    tensor_count INTEGER NOT NULL,
    files BLOB NOT NULL) STRICT;
)";

// In the order of kSql.
enum Sql : uint8_t {
  kFindFile,
  kFindArtifact,
  kListArtifacts,
  kInsertFile,
  kInsertArtifact,
  kForgetFiles,
  kForgetArtifacts,
  kSqlCount
};
constexpr const char* kSql[kSqlCount] = {
    "SELECT path, layout_digest, leaves FROM files"
    " WHERE device = ?1 AND inode = ?2 AND size_bytes = ?3 AND mtime_ns = ?4",
    "SELECT id, path, payload_bytes, tensor_count, files FROM artifacts WHERE id = ?1",
    "SELECT id, path, payload_bytes, tensor_count, files FROM artifacts ORDER BY number DESC",
    "INSERT OR REPLACE INTO files(device, inode, size_bytes, mtime_ns, path, layout_digest, leaves)"
    " VALUES(?1, ?2, ?3, ?4, ?5, ?6, ?7)",
    "INSERT OR REPLACE INTO artifacts(id, path, payload_bytes, tensor_count, files)"
    " VALUES(?1, ?2, ?3, ?4, ?5)",
    "DELETE FROM files WHERE number IN (SELECT number FROM files ORDER BY number"
    " LIMIT max(0, (SELECT count(*) FROM files) - ?1))",
    "DELETE FROM artifacts WHERE number IN (SELECT number FROM artifacts ORDER BY number"
    " LIMIT max(0, (SELECT count(*) FROM artifacts) - ?1))",
};

template <auto function>
struct Release {
  template <typename T>
  void operator()(T* handle) const {
    function(handle);
  }
};
using Database = std::unique_ptr<sqlite3, Release<sqlite3_close_v2>>;
using Statement = std::unique_ptr<sqlite3_stmt, Release<sqlite3_finalize>>;

Code code_of(int extended, int errno_value) {
  switch (extended & 0xff) {
    case SQLITE_FULL:
    case SQLITE_NOMEM:
    case SQLITE_TOOBIG:
      return Code::exhausted;
    case SQLITE_PERM:
    case SQLITE_AUTH:
    case SQLITE_READONLY:
      return Code::denied;
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
    case SQLITE_PROTOCOL:
      return Code::unavailable;
    case SQLITE_IOERR:
    case SQLITE_CANTOPEN:
      return base::errno_error("", errno_value).code;
    default:
      return Code::corrupt;  // also statements that fit no table: the schema is not the one of its version
  }
}

constexpr std::string_view hint_of(Code code) {
  switch (code) {
    case Code::exhausted:
      return "; free space there";
    case Code::denied:
      return "; it must be writable by this user";
    case Code::unavailable:
      return "; another process may hold it";
    case Code::corrupt:
      return "; it can be deleted, the next loads fill it again";
    default:
      return "";
  }
}

// An open database and the words for its failures.
struct Connection {
  std::string path;
  Database database;

  tl::unexpected<Error> failed(std::string_view what, Code code, std::string_view why) const {
    return fail(code, text("catalog ", path, ": ", what, ": ", why, hint_of(code)));
  }
  tl::unexpected<Error> failed(std::string_view what) const {
    sqlite3* db = database.get();
    return failed(what, code_of(sqlite3_extended_errcode(db), sqlite3_system_errno(db)), sqlite3_errmsg(db));
  }
  Status execute(std::string_view what, const std::string& sql) const {
    const int code = sqlite3_exec(database.get(), sql.c_str(), nullptr, nullptr, nullptr);
    if (code != SQLITE_OK) return failed(what);
    return {};
  }
  Result<Statement> prepare(std::string_view what, const char* sql) const {
    sqlite3_stmt* statement = nullptr;
    const int code =
        sqlite3_prepare_v3(database.get(), sql, -1, SQLITE_PREPARE_PERSISTENT, &statement, nullptr);
    if (code != SQLITE_OK) return failed(what);
    return Statement(statement);
  }
};

template <typename T>
std::string_view raw_view(std::span<const T> values) {
  static_assert(std::is_trivially_copyable_v<T> && std::has_unique_object_representations_v<T>);
  return {reinterpret_cast<const char*>(values.data()), values.size_bytes()};
}
std::string_view raw_view(const tensor::Digest& digest) { return raw_view(std::span(&digest, 1)); }

// One run of a prepared statement. What is bound must stay until it ends.
class Query {
 public:
  Query(const Connection& connection, sqlite3_stmt* statement, std::string_view what)
      : connection_(connection), statement_(statement), what_(what) {}
  Query(const Query&) = delete;
  Query& operator=(const Query&) = delete;
  ~Query() {
    sqlite3_reset(statement_);
    sqlite3_clear_bindings(statement_);
  }

  Query& integer(uint64_t value) {
    return note(sqlite3_bind_int64(statement_, ++bound_count_, static_cast<int64_t>(value)));
  }
  Query& words(std::string_view value) {
    return note(sqlite3_bind_text64(statement_, ++bound_count_, value.data(), value.size(), SQLITE_STATIC,
                                    SQLITE_UTF8));
  }
  Query& bytes(std::string_view value) {  // an empty one must not become NULL
    const char* data = value.empty() ? "" : value.data();
    return note(sqlite3_bind_blob64(statement_, ++bound_count_, data, value.size(), SQLITE_STATIC));
  }
  Query& identity(const base::FileIdentity& file) {
    return integer(file.device)
        .integer(file.inode)
        .integer(file.size_bytes)
        .integer(static_cast<uint64_t>(file.mtime_ns));
  }

  // True when there is a row.
  Result<bool> step() {
    if (!bound_) return connection_.failed(what_);
    const int code = sqlite3_step(statement_);
    if (code != SQLITE_ROW && code != SQLITE_DONE) return connection_.failed(what_);
    return code == SQLITE_ROW;
  }
  Status run() {
    TRY(step());
    return {};
  }

  // Columns of the row, left to right. What has another type or size than it should is told by sound().
  uint64_t next_integer() {
    return static_cast<uint64_t>(typed(SQLITE_INTEGER) ? sqlite3_column_int64(statement_, column_ - 1) : 0);
  }
  std::string next_words() { return typed(SQLITE_TEXT) ? std::string(raw_column()) : std::string(); }
  template <typename T>
  std::vector<T> next_values() {
    const std::string_view raw = typed(SQLITE_BLOB) ? raw_column() : std::string_view();
    if (raw.size() % sizeof(T) != 0) sound_ = false;
    std::vector<T> values(raw.size() / sizeof(T));
    if (!values.empty()) std::memcpy(values.data(), raw.data(), values.size() * sizeof(T));
    return values;
  }
  tensor::Digest next_digest() {
    const auto digests = next_values<tensor::Digest>();
    if (digests.size() != 1) sound_ = false;
    return digests.empty() ? tensor::Digest{} : digests.front();
  }
  // After the last column.
  Status sound() {
    column_ = 0;
    if (!sound_) return connection_.failed(what_, Code::corrupt, "the record is damaged");
    return {};
  }

 private:
  Query& note(int code) {
    CHECK(code != SQLITE_RANGE && code != SQLITE_MISUSE);
    bound_ = bound_ && code == SQLITE_OK;
    return *this;
  }
  bool typed(int type) {
    const bool fits = sqlite3_column_type(statement_, column_++) == type;
    sound_ = sound_ && fits;
    return fits;
  }
  std::string_view raw_column() const {
    const auto* data = static_cast<const char*>(sqlite3_column_blob(statement_, column_ - 1));
    const int size_bytes = sqlite3_column_bytes(statement_, column_ - 1);
    return data == nullptr ? std::string_view() : std::string_view(data, static_cast<size_t>(size_bytes));
  }

  const Connection& connection_;
  sqlite3_stmt* const statement_;
  const std::string_view what_;
  int bound_count_ = 0;
  int column_ = 0;
  bool bound_ = true;
  bool sound_ = true;
};

// Takes back what was done unless it was committed.
class Transaction {
 public:
  explicit Transaction(const Connection& connection) : connection_(connection) {}
  Transaction(const Transaction&) = delete;
  Transaction& operator=(const Transaction&) = delete;
  ~Transaction() {
    sqlite3* db = connection_.database.get();
    if (!sqlite3_get_autocommit(db)) sqlite3_exec(db, "ROLLBACK", nullptr, nullptr, nullptr);
  }
  Status begin(std::string_view what) { return connection_.execute(what, "BEGIN IMMEDIATE"); }
  Status commit(std::string_view what) { return connection_.execute(what, "COMMIT"); }

 private:
  const Connection& connection_;
};

class SqliteCatalog final : public Catalog {
 public:
  SqliteCatalog(Connection connection, const CatalogLimits& limits)
      : connection_(std::move(connection)), limits_(limits) {}

  Status prepare() {
    for (int i = 0; i < kSqlCount; ++i) {
      TRY_ASSIGN(statements_[i], connection_.prepare("read the schema", kSql[i]));
    }
    return {};
  }

  Result<std::optional<FileRecord>> find_file(const base::FileIdentity& identity) override {
    Query query = start(kFindFile, "find a file");
    TRY_ASSIGN(const bool found, query.identity(identity).step());
    if (!found) return std::nullopt;
    FileRecord file{.identity = identity};
    file.path = query.next_words();
    file.layout_digest = query.next_digest();
    file.leaves = query.next_values<tensor::Digest>();
    TRY(query.sound());
    return file;
  }

  Result<std::optional<ArtifactRecord>> find_artifact(const tensor::Digest& id) override {
    Query query = start(kFindArtifact, "find an artifact");
    TRY_ASSIGN(const bool found, query.bytes(raw_view(id)).step());
    if (!found) return std::nullopt;
    TRY_ASSIGN(ArtifactRecord artifact, artifact_of(query));
    return artifact;
  }

  Result<std::vector<ArtifactRecord>> list_artifacts() override {
    Query query = start(kListArtifacts, "list the artifacts");
    std::vector<ArtifactRecord> artifacts;
    while (true) {
      TRY_ASSIGN(const bool found, query.step());
      if (!found) return artifacts;
      TRY_ASSIGN(artifacts.emplace_back(), artifact_of(query));
    }
  }

  Status remember(const std::optional<ArtifactRecord>& artifact,
                  const std::vector<FileRecord>& files) override {
    const std::string what = artifact ? text("remember ", artifact->path) : "remember files";
    Transaction transaction(connection_);
    TRY(transaction.begin(what));
    for (const FileRecord& file : files) {
      TRY(start(kInsertFile, what)
              .identity(file.identity)
              .words(file.path)
              .bytes(raw_view(file.layout_digest))
              .bytes(raw_view(std::span(file.leaves)))
              .run());
    }
    if (artifact) {
      TRY(start(kInsertArtifact, what)
              .bytes(raw_view(artifact->id))
              .words(artifact->path)
              .integer(artifact->payload_bytes)
              .integer(artifact->tensor_count)
              .bytes(raw_view(std::span(artifact->files)))
              .run());
    }
    TRY(start(kForgetFiles, what).integer(limits_.file_count_max).run());
    TRY(start(kForgetArtifacts, what).integer(limits_.artifact_count_max).run());
    return transaction.commit(what);
  }

 private:
  Query start(Sql sql, std::string_view what) { return {connection_, statements_[sql].get(), what}; }

  static Result<ArtifactRecord> artifact_of(Query& query) {
    ArtifactRecord artifact;
    artifact.id = query.next_digest();
    artifact.path = query.next_words();
    artifact.payload_bytes = query.next_integer();
    artifact.tensor_count = query.next_integer();
    artifact.files = query.next_values<base::FileIdentity>();
    TRY(query.sound());
    return artifact;
  }

  const Connection connection_;
  const CatalogLimits limits_;
  Statement statements_[kSqlCount];  // end before the connection
};

// The first column of the only row.
Result<uint64_t> read_number(const Connection& connection, const char* sql) {
  TRY_ASSIGN(const Statement statement, connection.prepare("read the schema", sql));
  Query query(connection, statement.get(), "read the schema");
  TRY(query.step());
  const uint64_t number = query.next_integer();
  TRY(query.sound());
  return number;
}

// Writes the schema into an empty database and refuses one that is not ours, in a transaction because another
// process may be at the same.
Status adopt(const Connection& connection) {
  constexpr std::string_view kWhat = "open";
  Transaction transaction(connection);
  TRY(transaction.begin(kWhat));
  TRY_ASSIGN(const uint64_t table_count, read_number(connection, "SELECT count(*) FROM sqlite_schema"));
  if (table_count == 0) {
    TRY(connection.execute("write the schema", text(kSchema, "PRAGMA application_id = ", kApplicationId,
                                                    "; PRAGMA user_version = ", kSchemaVersion)));
  }
  TRY_ASSIGN(const uint64_t application, read_number(connection, "PRAGMA application_id"));
  TRY_ASSIGN(const uint64_t unsigned_version, read_number(connection, "PRAGMA user_version"));
  const auto version = static_cast<int64_t>(unsigned_version);
  if (application != kApplicationId) {
    return connection.failed(kWhat, Code::corrupt, "it is a database of another program");
  }
  if (version > kSchemaVersion) {
    return connection.failed(kWhat, Code::unsupported,
                             text("version ", version, " is of a newer tensord, this one knows ",
                                  kSchemaVersion, "; use that tensord or another state folder"));
  }
  if (version < kSchemaVersion) {
    return connection.failed(kWhat, Code::corrupt, text("there never was a version ", version));
  }
  return transaction.commit(kWhat);
}

// A database may come with triggers and views of anyone's: none of them is run.
Status distrust(const Connection& connection) {
  sqlite3* db = connection.database.get();
  for (const auto& [option, value] : {std::pair{SQLITE_DBCONFIG_DEFENSIVE, 1},
                                      {SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0},
                                      {SQLITE_DBCONFIG_ENABLE_TRIGGER, 0},
                                      {SQLITE_DBCONFIG_ENABLE_VIEW, 0}}) {
    CHECK(sqlite3_db_config(db, option, value, nullptr) == SQLITE_OK);
  }
  return connection.execute("set up", "PRAGMA cell_size_check = ON");
}

// While another process opens a fresh file this fails at once instead of waiting (SQLite cannot wait for a
// stronger lock while it holds a weaker one), so the waiting is done here.
Status use_wal(const Connection& connection, int busy_timeout_ms) {
  for (int waited_ms = 0;; ++waited_ms) {
    const Status set = connection.execute("set up", "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL");
    if (set) break;
    if (set.error().code != Code::unavailable || waited_ms >= busy_timeout_ms) return set;
    sqlite3_sleep(1);
  }
  TRY_ASSIGN(const Statement statement, connection.prepare("set up", "PRAGMA journal_mode"));
  Query query(connection, statement.get(), "set up");
  TRY(query.step());
  if (const std::string mode = query.next_words(); mode != "wal") {
    base::log(base::LogLevel::warning, "the catalog ", connection.path, " stays in journal mode ", mode,
              ": its file system has no shared memory");
  }
  return query.sound();
}

}  // namespace

Result<std::unique_ptr<Catalog>> open_sqlite_catalog(const std::string& path, const SqliteOptions& options) {
  // Made before SQLite would make it readable for others. Not opened: a close would drop the locks that this
  // process holds on it (sqlite.org/howtocorrupt.html, 2.2).
  if (::mknod(path.c_str(), S_IFREG | 0600, 0) != 0 && errno != EEXIST) {
    return tl::unexpected(base::errno_error(text("create the catalog ", path), errno));
  }
  constexpr int kFlags = SQLITE_OPEN_READWRITE | SQLITE_OPEN_NOMUTEX | SQLITE_OPEN_EXRESCODE;
  sqlite3* opened = nullptr;
  const int code = sqlite3_open_v2(path.c_str(), &opened, kFlags, nullptr);
  Connection connection{path, Database(opened)};
  if (opened == nullptr) return fail(Code::exhausted, text("catalog ", path, ": ", sqlite3_errstr(code)));
  if (code != SQLITE_OK) return connection.failed("open");
  if (sqlite3_db_readonly(opened, "main") == 1) {
    return connection.failed("open", Code::denied, "it can only be read");
  }
  sqlite3_busy_timeout(opened, options.busy_timeout_ms);
  TRY(distrust(connection));
  TRY(adopt(connection));
  TRY(use_wal(connection, options.busy_timeout_ms));
  auto catalog = std::make_unique<SqliteCatalog>(std::move(connection), options.limits);
  TRY(catalog->prepare());
  return catalog;
}

}  // namespace tensord::catalog
