# SCCONV_SRU_REVISION: of the sources and the compiler, as trt_plugins/build.py makes it.
file(GLOB library_sources RELATIVE ${CMAKE_CURRENT_LIST_DIR} ${CMAKE_CURRENT_LIST_DIR}/sru_math.h
  ${CMAKE_CURRENT_LIST_DIR}/kernel/* ${CMAKE_CURRENT_LIST_DIR}/plugin/* ${CMAKE_CURRENT_LIST_DIR}/register/*)
list(FILTER library_sources INCLUDE REGEX "\\.(h|cuh|cu|cpp)$")
list(SORT library_sources COMPARE STRING)
set(lines "")
foreach(source IN LISTS library_sources)
  file(SHA256 ${CMAKE_CURRENT_LIST_DIR}/${source} digest)
  string(APPEND lines "${source} ${digest}\n")
endforeach()
string(SHA256 digest "${lines}")
string(SUBSTRING ${digest} 0 12 digest)
set(SCCONV_SRU_REVISION r${digest}_cuda${CMAKE_CUDA_COMPILER_VERSION})
