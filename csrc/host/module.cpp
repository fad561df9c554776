// dflash_kernels._host: build information, the table of kernels, and the KV ledger. Optional: the package works
// without.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "host/ledger.h"

namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

std::map<std::string, std::string> build_info() {
  return {{"compiler", __VERSION__},
          {"cuda", DFLASH_HOST_CUDA},  // nvcc's version, or empty: CPU only
          {"cuda_archs", DFLASH_HOST_ARCHS},
          {"torch_target", "2.11"},
          {"pybind11", PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR)}};
}

// Source of each CUDA kernel file (below csrc) -> the architectures it was compiled for.
std::map<std::string, std::vector<std::string>> kernel_table() {
  std::map<std::string, std::vector<std::string>> table;
  for (const std::string& source : split(DFLASH_HOST_KERNELS)) {
    const std::string folder = source.substr(0, source.find('/'));
    std::vector<std::string> archs;
    for (const std::string& arch : split(DFLASH_HOST_ARCHS)) {
      const bool every = folder == "smxx";
      if (every || "sm" + arch.substr(0, arch.find_first_not_of("0123456789")) == folder) archs.push_back(arch);
    }
    table[source] = archs;
  }
  return table;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  namespace py = pybind11;
  using dflash::host::KvLedger;
  m.doc() = "Host side of dflash-kernels: build information, the table of kernels, the KV ledger.";
  m.def("build_info", &build_info, "How the library beside this module was built.");
  m.def("kernel_table", &kernel_table, "CUDA source file -> architectures that it was compiled for.");
  py::class_<KvLedger>(m, "KvLedger", "See dflash_kernels.ledger.PyKvLedger.")
      .def(py::init<int64_t, int64_t, int64_t>(), py::arg("num_pages"), py::arg("page_size"), py::arg("rows"))
      .def_property_readonly("num_pages", &KvLedger::num_pages)
      .def_property_readonly("page_size", &KvLedger::page_size)
      .def_property_readonly("rows", &KvLedger::rows)
      .def_property_readonly("used_pages", &KvLedger::used_pages)
      .def_property_readonly("free_pages", &KvLedger::free_pages)
      .def("row_len", &KvLedger::row_len, py::arg("row"))
      .def("try_reserve", &KvLedger::try_reserve, py::arg("rows"), py::arg("lens"))
      .def("shrink", &KvLedger::shrink, py::arg("row"), py::arg("length"))
      .def("release", &KvLedger::release, py::arg("row"), py::arg("keep_len"));
}
