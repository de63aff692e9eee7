// lightvlm_ext._host: host-side logic without tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

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

}  // namespace

PYBIND11_MODULE(_host, m) {
    m.doc() = "Host-side logic of lightvlm_ext, without tensors.";
    m.def("keep_counts", &keep_counts, py::arg("total"), py::arg("fractions"),
          "Tokens of an image of `total` tokens that are left after each stage of a schedule.");
    m.def("module_info", &module_info, "Version of this module and what it was built with.");
}
