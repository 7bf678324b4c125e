// Pictures from an ONNX generator that export.py wrote, or anybody's: C++17, ONNX Runtime and libpng.
//
//   cmake -S deploy -B build && cmake --build build
//   build/infer_ort model.onnx                                             a grid, beside the model
//   build/infer_ort model.onnx --n_samples 50000 --out samples.npy         uint8 (N, H, W, C)
//   build/infer_ort model.onnx --n_samples 1000 --labels 3,7 --out folder/
//   build/infer_ort model.onnx --benchmark
//
// Somebody else's generators: z float32 (N, nz) or (N, nz, 1, 1), labels int64 (N), pictures float32 or
// uint8. To embed a generator, copy what stands above "command line": latents() and class Generator.
// Picture i of a seed is that of infer_ort.py and of --sample of the training scripts.

#include <onnxruntime_cxx_api.h>
#include <png.h>
#ifdef _WIN32
#define NOMINMAX
#include <windows.h>
#else
#include <dlfcn.h>
#endif

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <future>
#include <iostream>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace fs = std::filesystem;

// A user's mistake: one line that names the flag or file and the way out.
using Error = std::runtime_error;

// The upper half of the product of two 64-bit numbers, from products of their halves.
inline uint64_t multiply_high(uint64_t a, uint64_t b) {
  const uint64_t low_half = 0xFFFFFFFF;
  const uint64_t a_low = a & low_half, a_high = a >> 32;
  const uint64_t b_low = b & low_half, b_high = b >> 32;
  const uint64_t middle = a_high * b_low + (a_low * b_low >> 32);
  const uint64_t carry = (a_low * b_high + (middle & low_half)) >> 32;
  return a_high * b_high + (middle >> 32) + carry;
}

// Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): four words for a
// counter.
inline std::array<uint64_t, 4> philox(uint64_t counter, uint64_t key) {
  const uint64_t m0 = 0xD2E7470EE14C6C93, m1 = 0xCA5A826395121157;
  std::array<uint64_t, 4> c = {counter, 0, 0, 0};
  uint64_t k0 = key, k1 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t high0 = multiply_high(c[0], m0), low0 = c[0] * m0;
    const uint64_t high1 = multiply_high(c[2], m1), low1 = c[2] * m1;
    c = {high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0};
    k0 += 0x9E3779B97F4A7C15;
    k1 += 0xBB67AE8584CAA73B;
  }
  return c;
}

// Latents start to start + n - 1 of a seed, (n, nz) ~ N(0, 1), those of latents() of the Python scripts:
// latent i takes ceil(nz / 4) blocks from counter 1 + i * ceil(nz / 4) on;
// u = (upper 53 bits + 1/2) / 2^53; Box-Muller makes two normal numbers of two u.
inline void latents(uint64_t seed, uint64_t start, int64_t n, int64_t nz, float* out) {
  const int64_t blocks = (nz + 3) / 4;
  for (int64_t i = 0; i < n; ++i) {
    float* row = out + i * nz;
    for (int64_t block = 0; block < blocks; ++block) {
      const auto words = philox((start + i) * blocks + block + 1, seed);
      for (int pair = 0; pair < 4; pair += 2) {
        const double u1 = ((words[pair] >> 11) + 0.5) * 0x1p-53;
        const double u2 = ((words[pair + 1] >> 11) + 0.5) * 0x1p-53;
        const double r = std::sqrt(-2 * std::log(u1));
        const double t = 2 * 3.14159265358979323846 * u2;
        const int64_t column = block * 4 + pair;
        if (column < nz) row[column] = (float)(r * std::cos(t));
        if (column + 1 < nz) row[column + 1] = (float)(r * std::sin(t));
      }
    }
  }
}

// A value of a file's metadata.
inline std::string lookup(const Ort::Session& session, const char* key, const std::string& otherwise) {
  Ort::AllocatorWithDefaultOptions allocator;
  const auto value = session.GetModelMetadata().LookupCustomMetadataMapAllocated(key, allocator);
  return value ? value.get() : otherwise;
}

// What a generator's float pictures hold, and how they become pixels: x * scale + offset, clamped to 0
// and 255, truncated.
struct Range {
  const char* name;
  float scale, offset;
};

// An ONNX generator: (n, nz) latents, and n labels where it is conditional, to uint8 pictures
// (n, height, width, channels). Several threads may use one object. Throws Error and Ort::Exception.
class Generator {
 public:
  // threads: on the CPU, 0 for ONNX Runtime's choice; gpu: number of the device, -1 for the CPU.
  explicit Generator(const fs::path& path, int threads = 0, int gpu = -1) : path_(path.string()) {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(threads);
    if (gpu >= 0) {
      // Since ONNX Runtime 1.20 no setting searches: cuDNN picks by its heuristics, of which
      // HEURISTIC means mode A and EXHAUSTIVE mode B. Before, EXHAUSTIVE timed every kernel.
      OrtCUDAProviderOptions cuda;
      cuda.device_id = gpu;
      cuda.cudnn_conv_algo_search = OrtCudnnConvAlgoSearchHeuristic;
      options.AppendExecutionProvider_CUDA(cuda);
      provider = "CUDA device " + std::to_string(gpu);
    }
    session_ = Ort::Session(env_, path.c_str(), options);
    if (metadata("format_version", "1") != "1")
      throw Error(path_ + ": of another format, made by another export.py; take its infer_ort.cpp");
    read_inputs();
    read_output();
    if (!uint8_ && metadata("value_range", "").empty()) range = recognise_range();
  }

  // z: n * nz floats; labels: n numbers, ignored by a generator without classes; out: n pictures.
  void operator()(const float* z, const int64_t* labels, int64_t n, uint8_t* out) {
    const Ort::Value images = run(z, labels, n);
    if (uint8_) {
      put(images.GetTensorData<uint8_t>(), n, out, [](uint8_t v) { return v; });
      return;
    }
    // for [-1, 1] the one conversion of the training scripts and of a graph with --uint8
    const float scale = range.scale, offset = range.offset;
    put(finite(images), n, out, [=](float v) {
      return (uint8_t)std::clamp(v * scale + offset, 0.0f, 255.0f);
    });
  }

  std::string metadata(const char* key, const std::string& otherwise) const {
    return lookup(session_, key, otherwise);
  }

  static constexpr int64_t any_class = INT64_MAX;
  int64_t nz = 0, channels = 0, height = 0, width = 0;
  int64_t n_classes = 0;    // 0: takes no labels; any_class: the file does not say
  int64_t fixed_batch = 0;  // 0: any
  std::string provider = "CPU";
  Range range = {"[-1, 1]", 127.5f, 128.0f};
  bool recognised_range = false;  // another than [-1, 1]

 private:
  // z is float, labels are integers, in any order.
  void read_inputs() {
    Ort::AllocatorWithDefaultOptions allocator;
    for (size_t i = 0; i < session_.GetInputCount(); ++i) {
      inputs_.push_back(session_.GetInputNameAllocated(i, allocator).get());
      const auto [type, shape] = tensor_of(session_.GetInputTypeInfo(i));
      if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 && shape.size() == 1) {
        labels_input_ = (int)i;
        n_classes = stated_classes();
      } else {
        demand(type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
        demand(shape.size() == 2 || (shape.size() == 4 && shape[2] == 1 && shape[3] == 1));
        demand(shape[1] > 0 && shape[1] <= 8192 && shape[0] <= 1 << 20);  // no product overflows
        nz = shape[1];
        fixed_batch = std::max<int64_t>(shape[0], 0);
        z_shape_ = shape;
      }
    }
    const size_t wanted = labels_input_ < 0 ? 1 : 2;
    demand(nz && inputs_.size() == wanted);
  }

  int64_t stated_classes() const {
    const std::string text = metadata("n_classes", "");
    if (text.empty()) return any_class;
    int64_t n = 0;
    const char* end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data(), end, n);
    demand(error == std::errc() && stop == end && 0 < n && n <= 1000000);
    return n;
  }

  void read_output() {
    Ort::AllocatorWithDefaultOptions allocator;
    output_ = session_.GetOutputNameAllocated(0, allocator).get();
    const auto [type, shape] = tensor_of(session_.GetOutputTypeInfo(0));
    uint8_ = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    demand(uint8_ || type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
    demand(shape.size() == 4);
    const bool channels_first = shape[1] == 1 || shape[1] == 3;
    nhwc_ = metadata("layout", channels_first ? "NCHW" : "NHWC") == "NHWC";
    channels = shape[nhwc_ ? 3 : 1];
    height = shape[nhwc_ ? 1 : 2];
    width = shape[nhwc_ ? 2 : 3];
    demand(channels == 1 || channels == 3);
    demand(std::min(height, width) > 0 && std::max(height, width) <= 1 << 14);
  }

  // The range of a file that does not state it, as the first 16 pictures of seed 0 show it. The rule
  // is that of infer_ort.py and infer_ort.html, or one seed would not be one picture.
  Range recognise_range() {
    const int64_t looked_at = 16;
    const int64_t batch = fixed_batch ? fixed_batch : looked_at;
    std::vector<float> z(batch * nz);
    const std::vector<int64_t> labels(batch, 0);
    float low = INFINITY, high = -INFINITY;
    for (int64_t i = 0; i < looked_at; i += batch) {
      latents(0, i, batch, nz, z.data());
      const Ort::Value images = run(z.data(), labels.data(), batch);
      const float* x = finite(images);
      const int64_t count = std::min(batch, looked_at - i) * height * width * channels;
      const auto [least, most] = std::minmax_element(x, x + count);
      low = std::min(low, *least);
      high = std::max(high, *most);
    }
    const bool unit = high <= 1.001f;
    const bool byte = high >= 32 && high <= 255.5f;
    recognised_range = low >= -0.001f && (unit || byte);
    if (!recognised_range) return range;
    if (unit) return {"[0, 1]", 255.0f, 0.5f};
    return {"[0, 255]", 1.0f, 0.5f};
  }

  Ort::Value run(const float* z, const int64_t* labels, int64_t n) {
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    std::vector<int64_t> shape = z_shape_;
    shape[0] = n;
    std::vector<Ort::Value> values;
    std::vector<const char*> names;
    for (size_t i = 0; i < inputs_.size(); ++i) {
      names.push_back(inputs_[i].c_str());
      if ((int)i == labels_input_) {  // ONNX Runtime only reads it, but asks for no const
        auto* data = const_cast<int64_t*>(labels);
        values.push_back(Ort::Value::CreateTensor(memory, data, n, &n, 1));
      } else {
        auto* data = const_cast<float*>(z);
        const size_t rank = shape.size();
        values.push_back(Ort::Value::CreateTensor(memory, data, n * nz, shape.data(), rank));
      }
    }
    const char* output = output_.c_str();
    const Ort::RunOptions plain{nullptr};
    auto results = session_.Run(plain, names.data(), values.data(), values.size(), &output, 1);
    const std::vector<int64_t> nchw = {n, channels, height, width};
    const std::vector<int64_t> nhwc = {n, height, width, channels};
    if (results[0].GetTensorTypeAndShapeInfo().GetShape() != (nhwc_ ? nhwc : nchw))
      throw Error(path_ + ": its output has another shape than it states");
    return std::move(results[0]);
  }

  const float* finite(const Ort::Value& images) const {
    const float* x = images.GetTensorData<float>();
    const size_t count = images.GetTensorTypeAndShapeInfo().GetElementCount();
    if (!std::all_of(x, x + count, [](float v) { return std::isfinite(v); }))
      throw Error(path_ + ": makes pictures that are not finite; damaged, or its training diverged");
    return x;
  }

  // Pixels of n pictures, in the order (n, height, width, channels) whatever theirs is.
  template <class T, class Convert>
  void put(const T* x, int64_t n, uint8_t* out, Convert convert) const {
    const int64_t pixels = height * width;
    if (nhwc_) {
      std::transform(x, x + n * pixels * channels, out, convert);
      return;
    }
    for (int64_t i = 0; i < n; ++i, out += pixels * channels)
      for (int64_t c = 0; c < channels; ++c, x += pixels)
        for (int64_t p = 0; p < pixels; ++p) out[p * channels + c] = convert(x[p]);
  }

  void demand(bool holds) const {
    if (!holds)
      throw Error(path_ + ": no generator; it should have z (N, nz) in, labels (N) if it has classes, "
                  "and pictures of 1 or 3 channels out, (N, C, H, W) or (N, H, W, C)");
  }

  struct Tensor {
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;  // of what is no tensor
    std::vector<int64_t> shape;  // -1: any size
  };

  static Tensor tensor_of(const Ort::TypeInfo& info) {
    if (info.GetONNXType() != ONNX_TYPE_TENSOR) return {};
    const auto tensor = info.GetTensorTypeAndShapeInfo();
    return {tensor.GetElementType(), tensor.GetShape()};
  }

  std::string path_;
  Ort::Env env_{ORT_LOGGING_LEVEL_FATAL, "infer_ort"};
  Ort::Session session_{nullptr};
  std::vector<std::string> inputs_;
  std::string output_;
  std::vector<int64_t> z_shape_;
  int labels_input_ = -1;  // -1: none
  bool uint8_ = false, nhwc_ = false;
};

// ------------------------------------------------------------------------------------- command line

static volatile std::sig_atomic_t interrupted = 0;

struct Options {
  std::string model, out, labels, provider = "auto";
  int64_t n_samples = 0;    // 0: 64, or 10 of each class
  int64_t batch_size = 32;  // as fast as 64 on a CPU, in less memory
  int64_t start = 0, threads = 0;
  int64_t device_id = -1;  // -1: not given
  uint64_t seed = 0;
  bool benchmark = false, help = false;
};

static const char* help =
    "usage: infer_ort MODEL.onnx [--n_samples N] [--batch_size N] [--seed N] [--start N]\n"
    "                 [--labels 0,3,7|all] [--out FILE.png|FILE.npy|FOLDER/] [--threads N]\n"
    "                 [--provider auto|cpu|cuda] [--device_id N] [--benchmark]\n"
    "Picture i of a seed is the same whatever the other flags. Default: a grid beside the model.\n"
    "auto takes CUDA if there is a GPU and it works, but the CPU for an int8 file.\n";

static int64_t number(const std::string& flag, const std::string& text, int64_t low, int64_t high) {
  int64_t value = 0;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error == std::errc() && stop == end && low <= value && value <= high) return value;
  const std::string range = std::to_string(low) + " to " + std::to_string(high);
  throw Error(flag + " " + text + ": give a whole number from " + range);
}

static Options parse(int argc, char** argv) {
  Options o;
  const int64_t most = int64_t(1) << 53;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    auto text = [&]() -> std::string {
      if (++i < argc && std::string(argv[i]).rfind("--", 0) != 0) return argv[i];
      throw Error(flag + ": needs a value");
    };
    auto value = [&](int64_t low, int64_t high) { return number(flag, text(), low, high); };
    if (flag == "--n_samples") o.n_samples = value(1, most);
    else if (flag == "--batch_size") o.batch_size = value(1, most);
    else if (flag == "--seed") o.seed = value(0, INT64_MAX);
    else if (flag == "--start") o.start = value(0, most);
    else if (flag == "--threads") o.threads = value(0, 1024);
    else if (flag == "--device_id") o.device_id = value(0, 1023);
    else if (flag == "--labels") o.labels = text();
    else if (flag == "--out") o.out = text();
    else if (flag == "--provider") o.provider = text();
    else if (flag == "--benchmark") o.benchmark = true;
    else if (flag == "--help" || flag == "-h") o.help = true;
    else if (flag.rfind("--", 0) != 0 && o.model.empty()) o.model = flag;
    else throw Error("--help lists the flags; " + flag + " is none");
  }
  if (o.provider != "auto" && o.provider != "cpu" && o.provider != "cuda")
    throw Error("--provider " + o.provider + ": choose auto, cpu or cuda");
  if (o.provider == "cpu" && o.device_id >= 0)
    throw Error("--device_id: --provider cpu uses no GPU");
  if (o.model.empty() && !o.help) throw Error("--help lists the flags; name a MODEL.onnx");
  return o;
}

// The classes that --labels names, which the pictures take in turn; none where it takes no labels.
static std::vector<int64_t> parse_labels(const std::string& text, const Generator& gen) {
  std::vector<int64_t> chosen;
  if (!gen.n_classes && !text.empty())
    throw Error("--labels " + text + ": this generator knows no classes");
  if (text.empty() || text == "all") {
    if (gen.n_classes == Generator::any_class)
      throw Error("--labels: this file does not say which classes it knows; name some: --labels 0,1,2");
    for (int64_t k = 0; k < gen.n_classes; ++k) chosen.push_back(k);
    return chosen;
  }
  std::istringstream names(text + ",");
  for (std::string name; std::getline(names, name, ',');)
    chosen.push_back(number("--labels", name, 0, gen.n_classes - 1));
  return chosen;
}

// Calls write(file) with a temporary name, then gives the file its own: nobody sees half a file.
static void write_file(const fs::path& path, const std::function<void(std::ofstream&)>& write) {
  static const std::string unique = std::to_string(std::random_device{}());  // for each program
  const std::string hidden = "." + path.filename().string() + "." + unique + ".tmp";
  const fs::path temporary = path.parent_path() / hidden;
  std::error_code ignored;
  if (path.has_parent_path()) fs::create_directories(path.parent_path(), ignored);
  try {
    std::ofstream file;
    file.exceptions(std::ios::failbit | std::ios::badbit);
    file.open(temporary, std::ios::binary);
    write(file);
    file.close();
    fs::rename(temporary, path);
  } catch (const std::system_error&) {  // of the stream or of rename; errno says why
    const std::string why = std::generic_category().message(errno);
    fs::remove(temporary, ignored);
    throw Error("--out " + path.string() + ": cannot be written (" + why + ")");
  } catch (...) {
    fs::remove(temporary, ignored);
    throw;
  }
}

static void write_png(const fs::path& path, const uint8_t* pixels, int64_t height, int64_t width,
                      int64_t channels) {
  png_image image{};
  image.version = PNG_IMAGE_VERSION;
  image.width = (png_uint_32)width;
  image.height = (png_uint_32)height;
  image.format = channels == 1 ? PNG_FORMAT_GRAY : PNG_FORMAT_RGB;
  image.flags = PNG_IMAGE_FLAG_FAST;
  png_alloc_size_t size = PNG_IMAGE_PNG_SIZE_MAX(image);
  std::vector<char> png(size);
  if (!png_image_write_to_memory(&image, png.data(), &size, 0, pixels, 0, nullptr))
    throw Error("--out " + path.string() + ": cannot be written (" + image.message + ")");
  write_file(path, [&](std::ofstream& file) { file.write(png.data(), size); });
}

// The head of a .npy file, version 1.0: magic, length, a Python literal, padded to 64 bytes or more.
static std::string npy_header(const std::string& type, const std::vector<int64_t>& shape) {
  std::string text = "{'descr': '" + type + "', 'fortran_order': False, 'shape': (";
  for (int64_t d : shape) text += std::to_string(d) + ",";
  text += "), }";
  text += std::string(63 - (10 + text.size()) % 64, ' ') + "\n";
  const std::string magic("\x93NUMPY\x01\x00", 8);
  return magic + (char)(text.size() & 255) + (char)(text.size() >> 8) + text;
}

// The n pictures that the flags ask for, and the ways to write them.
class Samples {
 public:
  Samples(Generator& generator, const Options& options)
      : gen(generator), o(options), choice(parse_labels(options.labels, generator)) {
    n = o.n_samples;
    if (!n) n = choice.empty() ? 64 : 10 * (int64_t)choice.size();
    batch = gen.fixed_batch ? gen.fixed_batch : std::min(o.batch_size, n);
    size = gen.height * gen.width * gen.channels;
    const int64_t most = (int64_t(1) << 58) / size;  // more would overflow
    if (std::max(n, batch) > most) throw std::bad_alloc();
  }

  void write_array(const fs::path& path) const {
    write_file(path, [&](std::ofstream& file) {
      file << npy_header("|u1", {n, gen.height, gen.width, gen.channels});
      generate([&](int64_t, auto& images, int64_t count) {
        file.write((const char*)images.data(), count * size);
      });
    });
    if (!gen.n_classes) return;
    const std::string name = path.stem().string() + "_labels.npy";
    write_file(path.parent_path() / name, [&](std::ofstream& file) {
      file << npy_header("<i8", {n});
      for (int64_t i = 0; i < n; ++i) {
        const int64_t k = label(i);
        file.write((const char*)&k, sizeof k);
      }
    });
  }

  // A grid like torchvision's: nearly a square, or a column for each class.
  void write_grid(const fs::path& path) const {
    const int64_t square = (int64_t)std::ceil(std::sqrt((double)n));
    const int64_t columns = std::min(n, choice.empty() ? square : (int64_t)choice.size());
    const int64_t rows = (n + columns - 1) / columns;
    const int64_t gap = n > 1 ? 2 : 0;
    const int64_t width = columns * (gen.width + gap) + gap;
    const int64_t height = rows * (gen.height + gap) + gap;
    const int64_t line = gen.width * gen.channels;  // bytes in one line of a picture
    std::vector<uint8_t> grid(height * width * gen.channels, 255);
    generate([&](int64_t first, const auto& images, int64_t count) {
      for (int64_t k = 0; k < count; ++k) {
        const int64_t top = (first + k) / columns * (gen.height + gap) + gap;
        const int64_t left = (first + k) % columns * (gen.width + gap) + gap;
        for (int64_t y = 0; y < gen.height; ++y) {
          uint8_t* to = &grid[((top + y) * width + left) * gen.channels];
          std::memcpy(to, &images[k * size + y * line], line);
        }
      }
    });
    write_png(path, grid.data(), height, width, gen.channels);
  }

  // While one batch is computed, the one before it is encoded.
  void write_folder(const fs::path& path) const {
    const int threads = std::max(1u, std::thread::hardware_concurrency());
    std::vector<uint8_t> previous;
    std::vector<std::future<void>> encoding;
    auto encode = [&](int64_t first, int64_t count, int thread) {
      for (int64_t k = thread; k < count; k += threads) {
        char name[32];
        std::snprintf(name, sizeof name, "%06lld.png", (long long)(o.start + first + k));
        write_png(path / name, &previous[k * size], gen.height, gen.width, gen.channels);
      }
    };
    auto wait = [&] {
      for (auto& part : encoding) part.get();
      encoding.clear();
    };
    generate([&](int64_t first, auto& images, int64_t count) {
      wait();
      previous.swap(images);
      for (int t = 0; t < threads; ++t)
        encoding.push_back(std::async(std::launch::async, encode, first, count, t));
    });
    wait();
  }

  void benchmark() const {
    const std::string precision = gen.metadata("precision", "unknown precision");
    const std::string threads = o.threads ? std::to_string(o.threads) : "all";
    std::cout << o.model << ": " << precision << ", " << gen.provider << ", " << threads
              << " CPU threads, ONNX Runtime " << Ort::GetVersionString() << "\n"
              << "batch  images/s    p50 ms    p95 ms    p99 ms" << std::endl;
    std::vector<int64_t> batches = {1, 4, 16, 64, 256};
    if (gen.fixed_batch) batches = {gen.fixed_batch};
    for (int64_t k : batches) {
      const std::vector<double> times = measure(k);
      double total = 0;
      for (double t : times) total += t;
      auto percentile = [&](double p) { return times[(size_t)(p * (times.size() - 1))]; };
      const double speed = 1000 * k * times.size() / total;
      std::printf("%5lld %9.1f %9.3f %9.3f %9.3f\n", (long long)k, speed, percentile(.5),
                  percentile(.95), percentile(.99));
    }
  }

 private:
  int64_t label(int64_t i) const {
    return choice.empty() ? 0 : choice[(o.start + i) % choice.size()];
  }

  // Calls use(first, images, how many) for batches in order; a rest is filled up with more pictures.
  void generate(const std::function<void(int64_t, std::vector<uint8_t>&, int64_t)>& use) const {
    std::vector<float> z(batch * gen.nz);
    std::vector<int64_t> labels(batch);
    std::vector<uint8_t> images;
    for (int64_t i = 0; i < n; i += batch) {
      if (interrupted) throw Error("interrupted; no file is half written");
      latents(o.seed, o.start + i, batch, gen.nz, z.data());
      for (int64_t k = 0; k < batch; ++k) labels[k] = label(i + k);
      images.resize(batch * size);
      gen(z.data(), labels.data(), batch, images.data());
      use(i, images, std::min(batch, n - i));
    }
  }

  // Milliseconds for a batch of k, sorted: at least 20 of them, and 2 seconds together.
  std::vector<double> measure(int64_t k) const {
    std::vector<float> z(k * gen.nz);
    std::vector<int64_t> labels(k);
    std::vector<uint8_t> images(k * size);
    latents(o.seed, o.start, k, gen.nz, z.data());
    for (int64_t i = 0; i < k; ++i) labels[i] = label(i);
    std::vector<double> times;
    double total = 0;
    for (int i = 0; total < 2000 || times.size() < 20; ++i) {
      if (interrupted) throw Error("interrupted");
      const auto begin = std::chrono::steady_clock::now();
      gen(z.data(), labels.data(), k, images.data());
      const auto end = std::chrono::steady_clock::now();
      if (i < 3) continue;  // warming up
      times.push_back(std::chrono::duration<double, std::milli>(end - begin).count());
      total += times.back();
    }
    std::sort(times.begin(), times.end());
    return times;
  }

  Generator& gen;
  const Options& o;
  const std::vector<int64_t> choice;
  int64_t n, batch;
  int64_t size;  // bytes of a picture
};

static void write_samples(Generator& gen, const Options& o, const fs::path& out) {
  const Samples samples(gen, o);
  if (gen.recognised_range)
    std::cerr << "infer_ort: warning: " << o.model << ": its pictures are in " << gen.range.name
              << ", and taken so" << std::endl;
  if (o.benchmark) {
    samples.benchmark();
    return;
  }
  const fs::path suffix = out.has_filename() ? out.extension() : "";
  if (suffix == ".npy") samples.write_array(out);
  else if (suffix == ".png") samples.write_grid(out);
  else samples.write_folder(out);
  std::cout << "wrote " << out.string() << std::endl;
}

// How many NVIDIA GPUs the driver has; 0 without a driver. Building or starting needs nothing of CUDA.
static int gpu_count() {
#ifdef _WIN32
  const HMODULE driver = LoadLibraryA("nvcuda.dll");
  auto find = [&](const char* name) { return (void*)GetProcAddress(driver, name); };
#else
  void* driver = dlopen("libcuda.so.1", RTLD_NOW);
  auto find = [&](const char* name) { return dlsym(driver, name); };
#endif
  if (!driver) return 0;
  const auto init = (int (*)(unsigned))find("cuInit");
  const auto count = (int (*)(int*))find("cuDeviceGetCount");
  int n = 0;
  if (!init || !count || init(0) != 0 || count(&n) != 0) return 0;
  return n;
}

static std::string in_one_line(std::string text) {
  std::replace_if(text.begin(), text.end(), [](unsigned char c) { return c < ' '; }, ' ');
  return text;
}

// The end of ONNX Runtime's message says why; what stands before it, and after "; GPU=", says where.
static std::string reason(const Ort::Exception& e) {
  std::string said = in_one_line(e.what());
  said = said.substr(0, said.find(" ; GPU="));
  return said.size() > 200 ? "..." + said.substr(said.size() - 200) : said;
}

// What the file says of its precision: read without a GPU, and without optimising the graph.
static std::string stated_precision(const fs::path& model) {
  const Ort::Env env(ORT_LOGGING_LEVEL_FATAL, "infer_ort");
  Ort::SessionOptions options;
  options.SetGraphOptimizationLevel(ORT_DISABLE_ALL);
  return lookup(Ort::Session(env, model.c_str(), options), "precision", "");
}

// The GPU to try, or -1 for none. auto takes the CPU for an int8 file, which CUDA would compute in float,
// with copies to the CPU and back in every run.
static int choose_gpu(const Options& o) {
  if (o.provider == "cpu") return -1;
  const int gpus = gpu_count();
  const int gpu = (int)std::max<int64_t>(o.device_id, 0);
  if (o.device_id >= gpus)
    throw Error("--device_id " + std::to_string(gpu) + ": this machine has " + std::to_string(gpus) +
                (gpus == 1 ? " GPU" : " GPUs") + ", numbered from 0");
  if (o.provider == "cuda" && !gpus)
    throw Error("--provider cuda: no NVIDIA GPU with a driver is here; take --provider cpu");
  if (!gpus) return -1;
  if (o.provider == "auto" && stated_precision(o.model) == "int8") return -1;
  return gpu;
}

static void run(const Options& o) {
  const fs::path beside = fs::path(o.model).replace_extension().string() + "_samples.png";
  const fs::path out = o.out.empty() ? beside : fs::path(o.out);
  const fs::path suffix = out.has_filename() ? out.extension() : "";
  if (suffix != ".png" && suffix != ".npy" && suffix != "")
    throw Error("--out " + o.out + ": give a .png, an .npy or a folder/");

  const int gpu = choose_gpu(o);
  std::string failure;
  if (gpu >= 0) {
    try {
      Generator gen(o.model, (int)o.threads, gpu);
      write_samples(gen, o, out);
      return;
    } catch (const Ort::Exception& e) {
      failure = reason(e);
    }
  }
  Generator gen(o.model, (int)o.threads);  // throws where not CUDA is at fault, but the file
  if (o.provider == "cuda")
    throw Error("--provider cuda: " + o.model + ": " + failure + "; take --provider cpu, a file of "
                "export.py --precision fp16, or the CUDA and cuDNN that this ONNX Runtime wants");
  if (!failure.empty())
    std::cerr << "infer_ort: warning: there is a GPU, but the CPU does all the work: " << failure
              << std::endl;
  write_samples(gen, o, out);
}

int main(int argc, char** argv) {
  for (int signal : {SIGINT, SIGTERM}) std::signal(signal, [](int) { interrupted = 1; });
  Options o;
  std::string message;
  try {
    o = parse(argc, argv);
    if (o.help) std::cout << help;
    else run(o);
    return 0;
  } catch (const Ort::Exception& e) {
    message = o.model + ": cannot be loaded or run: " + reason(e);
  } catch (const std::bad_alloc&) {
    message = "not enough memory; lower --batch_size or, for a grid, --n_samples";
  } catch (const std::exception& e) {
    message = e.what();
  }
  std::cerr << "infer_ort: error: " << in_one_line(message) << std::endl;
  return message.rfind("--", 0) == 0 ? 2 : 1;
}
