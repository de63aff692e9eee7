// lightvlm_ext._host: host-side logic without tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "host/page_pool.h"

namespace py = pybind11;

namespace {

// max(1, floor(fraction * total + 0.5)) tokens at each stage, never more than at the stage before.
std::vector<int64_t> keep_counts(int64_t total, const std::vector<double>& fractions) {
    if (total < 0) {
        throw std::invalid_argument("total: got " + std::to_string(total) + ", must be >= 0");
    }
    std::vector<int64_t> counts;
    counts.reserve(fractions.size());
    int64_t previous = total;
    for (size_t stage = 0; stage < fractions.size(); ++stage) {
        const double fraction = fractions[stage];
        if (!(fraction >= 0.0 && fraction <= 1.0)) {
            throw std::invalid_argument("fractions[" + std::to_string(stage) + "]: got " +
                                        std::to_string(fraction) + ", must be in [0, 1]");
        }
        const double rounded = std::floor(fraction * static_cast<double>(total) + 0.5);
        previous = std::min(previous, std::max<int64_t>(1, static_cast<int64_t>(rounded)));
        counts.push_back(previous);
    }
    return counts;
}

py::dict module_info() {
    py::dict info;
    info["version"] = LIGHTVLM_VERSION;
    info["python"] = PY_VERSION;
    info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(
        PYBIND11_VERSION_MINOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_PATCH);
    return info;
}

// The interpreter's lock is held throughout: a call is one step to other threads.
void bind_page_pool(py::module_& m) {
    using lightvlm::PagePool;
    py::register_exception<lightvlm::OutOfPages>(m, "OutOfPages", PyExc_RuntimeError);
    py::class_<PagePool>(m, "PagePool",
                         "Which pages of a paged KV cache are free, and the users of the others.")
        .def(py::init<int64_t>(), py::arg("pages"))
        .def("allocate", &PagePool::allocate, py::arg("n"))
        .def("free", &PagePool::free, py::arg("ids"))
        .def("share", &PagePool::share, py::arg("ids"))
        .def("refcount", &PagePool::refcount, py::arg("ids"))
        .def("refcounts", &PagePool::refcounts)
        .def("copy_on_write", &PagePool::copy_on_write, py::arg("pages"), py::arg("begin"),
             py::arg("end"), py::kw_only(), py::arg("page_size"))
        .def("reset", &PagePool::reset)
        .def_property_readonly("pages", &PagePool::pages)
        .def_property_readonly("available", &PagePool::available)
        .def("__repr__", [](const PagePool& pool) {
            return "PagePool(pages=" + std::to_string(pool.pages()) +
                   ", available=" + std::to_string(pool.available()) + ")";
        });
}

}  // namespace

PYBIND11_MODULE(_host, m) {
    m.doc() = "Host-side logic of lightvlm_ext, without tensors.";
    m.def("keep_counts", &keep_counts, py::arg("total"), py::arg("fractions"),
          "Tokens of an image of `total` tokens that are left after each stage of a schedule.");
    m.def("module_info", &module_info, "Version of this module and what it was built with.");
    bind_page_pool(m);
}
