# The version has one home: lightvlm_ext/_version.py.
file(STRINGS "${CMAKE_CURRENT_LIST_DIR}/../lightvlm_ext/_version.py" _line REGEX "^__version__ = ")
string(REGEX REPLACE ".*\"([0-9.]+)[^\"]*\".*" "\\1" LIGHTVLM_VERSION "${_line}")
string(REGEX REPLACE ".*\"([^\"]+)\".*" "\\1" LIGHTVLM_FULL_VERSION "${_line}")
