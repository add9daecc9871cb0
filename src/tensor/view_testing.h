// Views as text, for tests.
#pragma once

#include <optional>
#include <string>

#include "base/text.h"
#include "tensor/view.h"

namespace tensord::tensor {

// parse_view_item's inverse.
inline std::string to_text(const ViewItem& item) {
  // A name that ends like an index gets an empty index, so that it is read back as a name.
  if (item.items.empty()) return item.name.ends_with(']') ? item.name + "[]" : item.name;
  std::string out = item.name + "[";
  const auto append = [&](std::optional<int64_t> number) {
    if (number) base::append_text(out, *number);
  };
  for (const IndexItem& index : item.items) {
    if (&index != item.items.data()) out += ", ";
    switch (index.kind) {
      case IndexItem::Kind::ellipsis:
        out += "...";
        break;
      case IndexItem::Kind::new_axis:
        out += "None";
        break;
      case IndexItem::Kind::integer:
        append(index.integer);
        break;
      case IndexItem::Kind::slice:
        append(index.start);
        out += ":";
        append(index.stop);
        if (index.step) out += ":";
        append(index.step);
        break;
    }
  }
  return out + "]";
}

}  // namespace tensord::tensor
