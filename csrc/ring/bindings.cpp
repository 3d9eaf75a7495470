// dflash_scale._ring: names, types and errors only. What a ring does stands in ring.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <system_error>

#include "process.h"
#include "ring.h"

namespace py = pybind11;
using dflash::ring::Meta;
using dflash::ring::Record;
using dflash::ring::Ring;
using dflash::ring::Span;

namespace {

struct WritableSpan {
  Span span;
};
struct ReadOnlySpan {
  Span span;
};

py::buffer_info as_buffer(const Span& span, bool read_only) {
  return py::buffer_info(span.data, 1, py::format_descriptor<unsigned char>::format(), 1,
                         {static_cast<py::ssize_t>(span.bytes)}, {1}, read_only);
}

// The view holds the span, and the span the mapping: no view can point at unmapped memory.
py::object view(py::object span) { return py::reinterpret_steal<py::object>(PyMemoryView_FromObject(span.ptr())); }

py::object reserve(Ring& ring, std::size_t bytes) {
  auto span = ring.reserve(bytes);
  return span ? view(py::cast(WritableSpan{*span})) : py::none();
}

py::object read_record(Ring& ring) {
  auto record = ring.read();
  if (!record) return py::none();
  const Meta& m = record->meta;
  return py::make_tuple(m.sample, m.epoch, m.status, m.tokens, view(py::cast(ReadOnlySpan{record->payload})),
                        record->offset);
}

void translate(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const std::system_error& e) {  // OSError picks FileNotFoundError and its like from the number
    PyErr_SetObject(PyExc_OSError, py::make_tuple(e.code().value(), e.what()).ptr());
  }
}

}  // namespace

PYBIND11_MODULE(_ring, m) {
  m.doc() = "Lock-free one-writer one-reader ring in POSIX shared memory; see csrc/ring/ring.h.";
  py::register_exception_translator(&translate);
  py::class_<WritableSpan>(m, "WritableSpan", py::buffer_protocol()).def_buffer([](WritableSpan& s) {
    return as_buffer(s.span, false);
  });
  py::class_<ReadOnlySpan>(m, "ReadOnlySpan", py::buffer_protocol()).def_buffer([](ReadOnlySpan& s) {
    return as_buffer(s.span, true);
  });
  using unlocked = py::call_guard<py::gil_scoped_release>;  // making a ring allocates all of its pages
  py::class_<Ring>(m, "Ring")
      .def_static("create", &Ring::create, py::arg("name"), py::arg("capacity"), unlocked())
      .def_static("open", &Ring::open, py::arg("name"), unlocked())
      .def("reserve", &reserve, py::arg("nbytes"))
      .def(
          "commit",
          [](Ring& ring, std::uint64_t sample, std::uint64_t epoch, std::uint32_t status, std::uint64_t tokens) {
            ring.commit(Meta{sample, epoch, status, tokens});
          },
          py::arg("sample"), py::arg("epoch"), py::arg("status"), py::arg("tokens"))
      .def("abandon", &Ring::abandon)
      .def("beat", &Ring::beat)
      .def("read", &read_record)
      .def("release", &Ring::release)
      .def("records", [](const Ring& ring) { return view(py::cast(WritableSpan{ring.records()})); })
      .def("close", &Ring::close)
      .def("unlink", &Ring::unlink)
      .def("peer_attached", &Ring::peer_attached)
      .def("peer_alive", &Ring::peer_alive)
      .def("peer_pid", &Ring::peer_pid)
      .def_property("reader_mark", &Ring::reader_mark, &Ring::set_reader_mark)
      .def_property_readonly("writer_beat", &Ring::writer_beat)
      .def_property_readonly("released", &Ring::released)
      .def_property_readonly("capacity", &Ring::capacity)
      .def_property_readonly("name", &Ring::name);
  m.def("record_span", &dflash::ring::record_span, py::arg("payload"));
  m.def(
      "process_start",
      [](int pid) -> std::optional<std::uint64_t> {
        const std::uint64_t process = dflash::ring::process_id(pid);
        if (process == 0) return std::nullopt;
        return dflash::ring::process_start(process);
      },
      py::arg("pid"));
  m.def("reclaim", &dflash::ring::reclaim, py::arg("prefix") = "dflash-");
}
