#include "daemon/requests.h"

#include <fcntl.h>

#include <algorithm>
#include <charconv>

#include "base/clock.h"
#include "base/log.h"
#include "base/text.h"
#include "daemon/config.h"

namespace tensord::daemon {

using base::Code;
using base::fail;
using base::Result;
using protocol::Verb;

namespace {

// A descriptor handed over by a client: it must be a regular file, and open for reading only counts.
Result<engine::OpenFile> accept_file(base::Fd fd, std::string path) {
  const int mode = ::fcntl(fd.get(), F_GETFL);
  if (mode < 0 || (mode & O_ACCMODE) == O_WRONLY || (mode & O_PATH) != 0) {
    return fail(Code::invalid_argument, path + ": the descriptor is not open for reading");
  }
  TRY_ASSIGN(const base::FileIdentity identity, base::identify_file(fd.get(), path));
  return engine::OpenFile{std::move(fd), std::move(path), identity};
}

Result<engine::OpenOrder> to_order(rpc::Request& request) {
  const protocol::Open& open = *request.frame().request_as_Open();
  const size_t file_count = open.paths()->size();
  if (request.fds.size() != file_count) {
    return fail(Code::invalid_argument, base::text("open ", open.path()->str(), ": ", file_count, " paths came with ",
                                                   request.fds.size(), " descriptors"));
  }
  if (open.stay() > protocol::Stay::MAX) return fail(Code::unsupported, "no such stay of a replica");
  engine::OpenOrder order{
      .path = open.path()->str(), .index_only = open.index_only(), .stay = static_cast<engine::Stay>(open.stay())};
  if (open.device() != nullptr) order.device = open.device()->str();
  if (open.only() != nullptr) {
    for (const auto* words : *open.only()) order.only.push_back(words->str());
  }
  constexpr int64_t kWaitMsMax = int64_t{1000} * kMemoryWaitSecondsMax;
  if (open.memory_wait_ms() != 0) order.memory_wait_ms = std::clamp<int64_t>(open.memory_wait_ms(), 0, kWaitMsMax);
  order.holder = {request.client.process_id, request.client.user_id, request.client.process_name,
                  request.client.connection};
  for (size_t at = 0; at < file_count; ++at) {
    TRY_ASSIGN(engine::OpenFile file,
               accept_file(std::move(request.fds[at]), open.paths()->Get(static_cast<uint32_t>(at))->str()));
    order.files.push_back(std::move(file));
  }
  return order;
}

// A client says what it likes of itself; what is summed over all uses must not overflow: 256 uses of 1024 threads for an
// hour are 9.4e17 ns.
constexpr uint32_t kUseThreadsMax = 1024;
int64_t sane_ns(int64_t ns) { return std::clamp<int64_t>(ns, 0, int64_t{3600} * 1'000'000'000); }

// Which replica a call is about. Names for people are looked up in `list` by its sender.
Result<uint64_t> number_in(const protocol::Call& call) {
  const std::string text = call.selector() == nullptr ? "" : call.selector()->str();
  uint64_t number = 0;
  const auto [rest, problem] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (problem != std::errc() || rest != text.data() + text.size())
    return fail(Code::invalid_argument, base::quoted(text), " is no replica's number; `list` tells them");
  return number;
}

rpc::Frame opened_frame(uint64_t id, const engine::Grant& grant) {
  protocol::OpenedT opened;
  opened.replica = grant.replica;
  if (const auto index = base::identify_file(grant.index_fd, "the index")) opened.index_bytes = index->size_bytes;
  opened.fill_map_bytes = grant.fill_map_bytes;
  opened.image_bytes = grant.image_bytes;
  opened.segment_bytes = grant.segment_bytes;
  opened.batch_bytes = grant.batch_bytes;
  opened.memory_bytes_max = grant.memory_bytes_max;
  std::vector<int> fds;
  if (grant.lease.valid()) fds = {grant.lease.get(), grant.fill_map_fd};
  fds.push_back(grant.index_fd);
  fds.insert(fds.end(), grant.segment_fds.begin(), grant.segment_fds.end());
  return rpc::reply_opened(id, opened, fds);
}

}  // namespace

void Requests::handle(rpc::Request request) {
  switch (request.frame().request_type()) {
    case protocol::Request::Open:
      return open(std::move(request));
    case protocol::Request::Call:
      return call(request);
    case protocol::Request::Used:
      return used(request);
    case protocol::Request::Want: {
      const protocol::Want& want = *request.frame().request_as_Want();
      return engine_.want(want.replica(), want.first_block(), want.last_block());
    }
    case protocol::Request::CopyToDevice:
      return copy_to_device(std::move(request));
    case protocol::Request::Cancel:
      return devices_.cancel(request.client.connection, request.frame().request_as_Cancel()->id());
    default:
      break;
  }
  server_->reply(
      request.client.connection,
      rpc::reply_failure(request.frame().id(), {Code::unsupported, "this daemon does not know such a request"}));
}

void Requests::open(rpc::Request request) {
  const rpc::ConnectionId connection = request.client.connection;
  const uint64_t id = request.frame().id();
  auto order = to_order(request);
  if (!order) return server_->reply(connection, rpc::reply_failure(id, order.error()));
  engine_.open(std::move(*order), [this, connection, id](Result<engine::Grant> grant) {
    server_->reply(connection, grant ? opened_frame(id, *grant) : rpc::reply_failure(id, grant.error()));
  });
}

void Requests::copy_to_device(rpc::Request request) {
  const rpc::ConnectionId connection = request.client.connection;
  const uint64_t id = request.frame().id();
  devices_.copy(std::move(request), [this, connection, id](const Result<gpu::DeviceReport>& report) {
    if (!report) return server_->reply(connection, rpc::reply_failure(id, report.error()));
    protocol::CopiedToDeviceT copied;
    copied.bytes = report->bytes;
    copied.call_count = report->call_count;
    copied.prepare_ns = report->prepare_ns;
    copied.wait_ns = report->wait_ns;
    copied.copy_ns = report->end_ns - report->begin_ns;
    server_->reply(connection, rpc::reply_copied(id, copied));
  });
}

void Requests::reply_json(rpc::ConnectionId connection, uint64_t id, const Result<std::string>& json) {
  server_->reply(connection, json ? rpc::reply_report(id, *json) : rpc::reply_failure(id, json.error()));
}

void Requests::call(const rpc::Request& request) {
  const protocol::Call& body = *request.frame().request_as_Call();
  const rpc::ConnectionId connection = request.client.connection;
  const uint64_t id = request.frame().id();
  if (body.verb() != Verb::verify) {
    reply_json(connection, id, answer(body));
    if (body.verb() == Verb::stop) stop_();
    return;
  }
  const auto replica = selected(body);
  if (!replica) return reply_json(connection, id, base::pass_on(replica));
  const int64_t begin_ns = base::monotonic_ns();
  engine_.verify((*replica)->number, [this, connection, id, begin_ns, replica](const auto& faults) {
    reply_json(connection, id, faults.map([&](const auto& found) {
      return verify_json(**replica, base::monotonic_ns() - begin_ns, found);
    }));
  });
}

Result<const engine::Replica*> Requests::selected(const protocol::Call& call) const {
  TRY_ASSIGN(const uint64_t number, number_in(call));
  return engine_.find(number);
}

Result<std::string> Requests::answer(const protocol::Call& call) {
  switch (call.verb()) {
    case Verb::status:
      return status_json(config_, engine_, {started_ns_, server_->connection_count(), connection_count_max_});
    case Verb::list:
      return list_json(engine_);
    case Verb::stop:
      return stop_json();
    case Verb::explain: {
      TRY_ASSIGN(const uint64_t number, number_in(call));
      TRY_ASSIGN(const engine::LoadReport report, engine_.explain(number));
      return explain_json(report);
    }
    case Verb::evict: {
      TRY_ASSIGN(const engine::Replica* replica, selected(call));
      const std::string json = replica_json(*replica);
      TRY(engine_.evict(replica->number));
      return json;
    }
    case Verb::pin:
    case Verb::unpin: {
      TRY_ASSIGN(const engine::Replica* replica, selected(call));
      engine_.set_pinned(replica->number, call.verb() == Verb::pin);
      return replica_json(*replica);
    }
    default:
      return fail(Code::unsupported, "this daemon does not know such a verb");
  }
}

void Requests::used(const rpc::Request& request) {
  const protocol::Used& used = *request.frame().request_as_Used();
  engine::Use use{.pid = request.client.process_id, .name = request.client.process_name};
  const int64_t now_ns = base::monotonic_ns();
  const auto when_ns = [&](int64_t told_ns) { return std::clamp(told_ns, started_ns_, now_ns); };
  use.begin_ns = when_ns(used.begin_ns());
  use.map_begin_ns = when_ns(used.map_begin_ns());
  use.map_ns = sane_ns(used.map_ns());
  use.plan_ns = sane_ns(used.plan_ns());
  use.wait_ns = sane_ns(used.wait_ns());
  use.copy_ns = sane_ns(used.copy_ns());
  use.copy_bytes = std::min(used.copy_bytes(), tensor::kIndexBytesMax);
  use.device_bytes = std::min(used.device_bytes(), use.copy_bytes);
  if (used.slower_why() != nullptr) use.slower_why = used.slower_why()->str();
  use.record_count = used.record_count();
  use.thread_count = std::min(used.thread_count(), kUseThreadsMax);
  if (used.spans() != nullptr && base::log_enabled(base::LogLevel::debug)) {
    for (const protocol::Span* span : *used.spans()) {
      if (use.spans.size() == engine::kSpanCountMax) break;
      use.spans.push_back({span->begin_ns(), span->end_ns(), span->thread(), span->record(), span->size_bytes()});
    }
  }
  engine_.note_use(used.replica(), std::move(use));
}

}  // namespace tensord::daemon
