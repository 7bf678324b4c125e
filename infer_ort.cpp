// Pictures from an ONNX generator that export.py wrote, or anybody's, in C++17 with ONNX Runtime and libpng.
//
//   g++ -std=c++17 -O2 -pthread infer_ort.cpp -o infer_ort -I$ORT_ROOT/include -L$ORT_ROOT/lib -Wl,-rpath,$ORT_ROOT/lib -lonnxruntime -lpng -lz
//
// ORT_ROOT is ONNX Runtime's unpacked release archive, or a folder of links to a Python wheel's library and to the
// headers of libonnxruntime-dev, as README shows.
//
//   ./infer_ort model.onnx                                           a grid, beside the model
//   ./infer_ort model.onnx --n_samples 50000 --out samples.npy       uint8 (N, H, W, C)
//   ./infer_ort model.onnx --n_samples 1000 --labels 3,7 --out folder/
//   ./infer_ort model.onnx --benchmark
//
// Somebody else's generators: z float32 (N, nz) or (N, nz, 1, 1), labels int64 (N), pictures float32 or uint8.
//
// To embed a generator, copy what stands above "command line": latents() and class Generator. Picture i of a seed is
// that of infer_ort.py and of --sample of the training scripts.

#include <onnxruntime_cxx_api.h>
#include <png.h>
#include <zlib.h>

#include <algorithm>
#include <array>
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
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <unistd.h>

namespace fs = std::filesystem;

// A user's mistake: one line that names the flag or file and the way out.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): four words for a counter.
inline std::array<uint64_t, 4> philox(std::array<uint64_t, 4> c, uint64_t key) {
  uint64_t k0 = key, k1 = 0;
  for (int round = 0; round < 10; ++round) {
    unsigned __int128 a = (unsigned __int128)c[0] * 0xD2E7470EE14C6C93ull;
    unsigned __int128 b = (unsigned __int128)c[2] * 0xCA5A826395121157ull;
    c = {(uint64_t)(b >> 64) ^ c[1] ^ k0, (uint64_t)b, (uint64_t)(a >> 64) ^ c[3] ^ k1, (uint64_t)a};
    k0 += 0x9E3779B97F4A7C15ull;
    k1 += 0xBB67AE8584CAA73Bull;
  }
  return c;
}

// Latents start to start + n - 1 of a seed, (n, nz) ~ N(0, 1): the same as latents() of the Python scripts. Latent i
// takes ceil(nz / 4) blocks from counter 1 + i * ceil(nz / 4) on; u = (upper 53 bits of a word + 1/2) / 2^53; Box-Muller.
inline void latents(uint64_t seed, uint64_t start, int64_t n, int64_t nz, float* out) {
  const int64_t blocks = (nz + 3) / 4;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t block = 0; block < blocks; ++block) {
      unsigned __int128 counter = (unsigned __int128)(start + i) * blocks + block + 1;
      auto words = philox({(uint64_t)counter, (uint64_t)(counter >> 64), 0, 0}, seed);
      for (int pair = 0; pair < 4; pair += 2) {
        double u1 = ((words[pair] >> 11) + 0.5) * 0x1p-53, u2 = ((words[pair + 1] >> 11) + 0.5) * 0x1p-53;
        double r = std::sqrt(-2 * std::log(u1)), t = 2 * 3.14159265358979323846 * u2;
        int64_t column = block * 4 + pair;
        if (column < nz) out[i * nz + column] = (float)(r * std::cos(t));
        if (column + 1 < nz) out[i * nz + column + 1] = (float)(r * std::sin(t));
      }
    }
}

// An ONNX generator: (n, nz) latents, and n labels where it is conditional, to uint8 (n, height, width, channels).
// One object may be used by several threads at once. Throws Error and Ort::Exception.
class Generator {
 public:
  explicit Generator(const std::string& path, int threads = 0, bool cuda = false) : path_(path) {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(threads);
    if (cuda) {
      OrtCUDAProviderOptionsV2* provider = nullptr;
      try {
        Ort::ThrowOnError(Ort::GetApi().CreateCUDAProviderOptions(&provider));
        options.AppendExecutionProvider_CUDA_V2(*provider);
      } catch (const Ort::Exception&) {
        throw Error("--provider cuda: this ONNX Runtime cannot use a GPU here; take its GPU build with CUDA and cuDNN, "
                    "or --provider cpu");
      }
      Ort::GetApi().ReleaseCUDAProviderOptions(provider);
    }
    if (fs::is_directory(path)) throw Error(path + ": is a folder; name the .onnx file in it, or make one with export.py");
    if (!fs::is_regular_file(path)) throw Error(path + ": no such file");
    try {
      session_ = Ort::Session(env_, path.c_str(), options);
    } catch (const Ort::Exception&) {
      throw Error(path + ": not an ONNX file that can be run, or damaged");
    }
    Ort::AllocatorWithDefaultOptions allocator;
    for (size_t i = 0; i < session_.GetInputCount(); ++i) {
      inputs_.push_back(session_.GetInputNameAllocated(i, allocator).get());
      auto info = session_.GetInputTypeInfo(i);
      if (info.GetONNXType() != ONNX_TYPE_TENSOR) refuse(path);
      auto tensor = info.GetTensorTypeAndShapeInfo();
      auto shape = tensor.GetShape();
      auto type = tensor.GetElementType();
      if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT && (shape.size() == 2 || shape.size() == 4) && shape[1] > 0 &&
          nz == 0) {
        nz = shape[1];
        z_shape_ = shape;
        fixed_batch = std::max<int64_t>(shape[0], 0);
        if (shape.size() == 4 && (shape[2] != 1 || shape[3] != 1)) refuse(path);
      } else if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 && shape.size() == 1) {
        n_classes = std::numeric_limits<int64_t>::max();
        labels_first_ = i == 0;
      } else {
        refuse(path);
      }
    }
    if (nz == 0 || inputs_.size() > 2 || session_.GetOutputCount() < 1) refuse(path);
    output_ = session_.GetOutputNameAllocated(0, allocator).get();
    auto info = session_.GetOutputTypeInfo(0);
    if (info.GetONNXType() != ONNX_TYPE_TENSOR) refuse(path);
    auto tensor = info.GetTensorTypeAndShapeInfo();
    auto shape = tensor.GetShape();
    uint8_ = tensor.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    if (shape.size() != 4 || (!uint8_ && tensor.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT)) refuse(path);
    auto is_channels = [&](int axis) { return shape[axis] == 1 || shape[axis] == 3; };
    std::string layout = metadata("layout", is_channels(3) && !is_channels(1) ? "NHWC" : "NCHW");
    nhwc_ = layout == "NHWC";
    if (!is_channels(nhwc_ ? 3 : 1)) refuse(path);
    channels = shape[nhwc_ ? 3 : 1], height = shape[nhwc_ ? 1 : 2], width = shape[nhwc_ ? 2 : 3];
    if (height < 1 || width < 1 || height > 1 << 14 || width > 1 << 14) refuse(path);
    auto agrees = [&](const char* key, int64_t value) { return metadata(key, std::to_string(value)) == std::to_string(value); };
    std::string classes = metadata("n_classes", "");
    bool bad = !agrees("nz", nz) || !agrees("nc", channels) || !agrees("img_size", height);
    if (n_classes && !classes.empty()) {
      bad = bad || classes.size() > 9 || classes.find_first_not_of("0123456789") != std::string::npos || classes == "0";
      if (!bad) n_classes = std::stoll(classes);
    }
    if (bad) throw Error(path + ": its metadata contradicts its tensors, it was tampered with");
    if (metadata("format_version", "1") != "1")
      throw Error(path + ": of another format, made by another export.py; take the infer_ort.cpp beside that one");
    check_crc(metadata("crc32", ""));
  }

  // z: n * nz floats; labels: n numbers, ignored by a generator without classes; out: n * height * width * channels.
  void operator()(const float* z, const int64_t* labels, int64_t n, uint8_t* out) {
    auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    std::vector<int64_t> shape = z_shape_, label_shape = {n};
    shape[0] = n;
    std::vector<Ort::Value> values;
    std::vector<const char*> names;
    for (auto& name : inputs_) {
      names.push_back(name.c_str());
      bool is_z = values.size() == z_input();
      values.push_back(is_z ? Ort::Value::CreateTensor<float>(memory, const_cast<float*>(z), n * nz, shape.data(), shape.size())
                            : Ort::Value::CreateTensor<int64_t>(memory, const_cast<int64_t*>(labels), n, label_shape.data(), 1));
    }
    const char* output = output_.c_str();
    std::vector<Ort::Value> result;
    try {
      result = session_.Run(Ort::RunOptions{nullptr}, names.data(), values.data(), values.size(), &output, 1);
    } catch (const Ort::Exception&) {
      throw Error(path_ + ": cannot be run: it is damaged, " +
                  (n_classes == std::numeric_limits<int64_t>::max() ? "knows fewer classes than --labels names, " : "") +
                  "or the memory does not suffice (try --batch_size 16)");
    }
    auto got = result[0].GetTensorTypeAndShapeInfo();
    const int64_t pixels = height * width;
    if ((int64_t)got.GetElementCount() != n * pixels * channels) throw Error(path_ + ": its output has another shape than it states");
    if (!uint8_) {
      const float* x = result[0].GetTensorData<float>();
      if (!std::all_of(x, x + n * pixels * channels, [](float v) { return std::isfinite(v); }))
        throw Error(path_ + ": makes pictures that are not finite; it is damaged, or its training diverged");
    }
    auto put = [&](const auto* x, auto convert) {
      if (nhwc_) {
        std::transform(x, x + n * pixels * channels, out, convert);
        return;
      }
      for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < channels; ++c, x += pixels)
          for (int64_t p = 0; p < pixels; ++p) out[(i * pixels + p) * channels + c] = convert(x[p]);
    };
    if (uint8_)
      put(result[0].GetTensorData<uint8_t>(), [](uint8_t v) { return v; });
    else  // the one conversion, the same in the training scripts and in a graph with --uint8
      put(result[0].GetTensorData<float>(), [](float v) { return (uint8_t)std::clamp(v * 127.5f + 128.0f, 0.0f, 255.0f); });
  }

  std::string metadata(const char* key, const std::string& otherwise) {
    Ort::AllocatorWithDefaultOptions allocator;
    auto value = session_.GetModelMetadata().LookupCustomMetadataMapAllocated(key, allocator);
    return value ? value.get() : otherwise;
  }

  int64_t nz = 0, channels = 0, height = 0, width = 0;
  int64_t n_classes = 0;    // 0: takes no labels; int64's maximum: the file does not say
  int64_t fixed_batch = 0;  // 0: any

 private:
  size_t z_input() const { return inputs_.size() == 2 && labels_first_ ? 1 : 0; }
  [[noreturn]] static void refuse(const std::string& path) {
    throw Error(path + ": no generator; it should have z (N, nz) in, and pictures of 1 or 3 channels out, "
                "(N, C, H, W) or (N, H, W, C)");
  }

  // export.py's files end in eight hexadecimal digits, the CRC-32 of all before them.
  void check_crc(const std::string& stated) const {
    if (stated.empty()) return;
    std::ifstream file(path_, std::ios::binary);
    std::vector<char> data((size_t)fs::file_size(path_));
    file.read(data.data(), data.size());
    const size_t n = data.size() < 8 ? 0 : data.size() - 8;
    char found[9];
    std::snprintf(found, sizeof found, "%08lx", crc32_z(0, (const unsigned char*)data.data(), n));
    if (!file || stated != found || stated != std::string(data.begin() + n, data.end()))
      throw Error(path_ + ": damaged, or changed since export.py wrote it; export it again, or, if the change is yours, "
                  "delete its metadata entry crc32");
  }

  std::string path_;
  Ort::Env env_{ORT_LOGGING_LEVEL_FATAL, "infer_ort"};
  Ort::Session session_{nullptr};
  std::vector<std::string> inputs_;
  std::string output_;
  std::vector<int64_t> z_shape_;
  bool uint8_ = false, nhwc_ = false, labels_first_ = false;
};

// -------------------------------------------------------------------------------------------------- command line

static volatile std::sig_atomic_t interrupted = 0;

struct Options {
  std::string model, out, provider = "cpu";
  std::optional<std::string> labels;
  int64_t n_samples = 0, batch_size = 32, start = 0, threads = 0;  // 32: as fast as 64 on a CPU, in less memory
  uint64_t seed = 0;
  bool benchmark = false;
};

static const char* help =
    "usage: infer_ort MODEL.onnx [--n_samples N] [--batch_size N] [--seed N] [--start N] [--labels 0,3,7|all]\n"
    "                 [--out FILE.png|FILE.npy|FOLDER/] [--threads N] [--provider cpu|cuda] [--benchmark]\n"
    "Picture i of a seed is the same whatever the other flags. Default: a grid beside the model.\n";

static int64_t number(const std::string& flag, const std::string& text, int64_t low, int64_t high) {
  if (!text.empty() && text.size() < 20 && text.find_first_not_of("0123456789") == std::string::npos) {
    unsigned long long value = std::stoull(text);
    if (value >= (unsigned long long)low && value <= (unsigned long long)high) return (int64_t)value;
  }
  throw Error(flag + " " + text + ": give a whole number from " + std::to_string(low) + " to " + std::to_string(high));
}

static Options parse(int argc, char** argv) {
  Options o;
  const int64_t most = int64_t(1) << 53;
  for (int i = 1; i < argc; ++i) {
    std::string flag = argv[i];
    if (flag == "--help" || flag == "-h") {
      std::cout << help;
      std::exit(0);
    }
    if (flag == "--benchmark") {
      o.benchmark = true;
      continue;
    }
    if (flag.rfind("--", 0) != 0) {
      if (!o.model.empty()) throw Error("--help lists the flags; there are two models: " + o.model + " and " + flag);
      o.model = flag;
      continue;
    }
    std::string value;
    if (size_t equals = flag.find('='); equals != std::string::npos) {
      value = flag.substr(equals + 1);
      flag.erase(equals);
    } else {
      if (i + 1 == argc) throw Error(flag + ": needs a value, or is no flag; --help lists them");
      value = argv[++i];
    }
    if (flag == "--n_samples") o.n_samples = number(flag, value, 1, most);
    else if (flag == "--batch_size") o.batch_size = number(flag, value, 1, most);
    else if (flag == "--seed") o.seed = number(flag, value, 0, std::numeric_limits<int64_t>::max());
    else if (flag == "--start") o.start = number(flag, value, 0, most);
    else if (flag == "--threads") o.threads = number(flag, value, 0, 1024);
    else if (flag == "--labels") o.labels = value;
    else if (flag == "--out") o.out = value;
    else if (flag == "--provider" && (value == "cpu" || value == "cuda")) o.provider = value;
    else if (flag == "--provider") throw Error("--provider " + value + ": choose cpu or cuda");
    else throw Error(flag + ": no such flag; --help lists them");
  }
  if (o.model.empty()) throw Error("--help lists the flags; name a MODEL.onnx");
  return o;
}

static std::vector<int64_t> parse_labels(const std::optional<std::string>& given, const Generator& gen) {
  const std::string text = given.value_or("all");
  const bool unknown = gen.n_classes == std::numeric_limits<int64_t>::max();
  std::vector<int64_t> chosen;
  if (!gen.n_classes && given) throw Error("--labels " + text + ": this generator knows no classes; leave it out");
  if (unknown && text == "all")
    throw Error("--labels: this file does not say how many classes it knows; name some, such as --labels 0,1,2");
  if (text == "all") {
    for (int64_t k = 0; k < gen.n_classes; ++k) chosen.push_back(k);
    return chosen;
  }
  for (size_t i = 0; i <= text.size();) {
    size_t comma = std::min(text.find(',', i), text.size());
    const size_t from = std::min(text.find_first_not_of(' ', i), comma), last = text.find_last_not_of(' ', comma - 1);
    const std::string name = from == comma ? "" : text.substr(from, last + 1 - from);
    chosen.push_back(number("--labels", name, 0, gen.n_classes - 1));
    i = comma + 1;
  }
  return chosen;
}

// Calls write(temporary name), then gives the file its name: nobody ever sees half a file.
static void atomic_write(const fs::path& path, const std::function<void(const std::string&)>& write) {
  std::error_code ignored;
  if (path.has_parent_path()) fs::create_directories(path.parent_path(), ignored);
  fs::path tmp = path.parent_path() / ("." + path.filename().string() + "." + std::to_string(getpid()) + ".tmp");
  try {
    write(tmp.string());
    fs::rename(tmp, path);
  } catch (const fs::filesystem_error& e) {
    fs::remove(tmp, ignored);
    throw Error("--out " + path.string() + ": cannot be written (" + e.code().message() + ")");
  } catch (...) {
    fs::remove(tmp, ignored);
    throw;
  }
}

static void write_png(const fs::path& path, const uint8_t* pixels, int64_t height, int64_t width, int64_t channels) {
  atomic_write(path, [&](const std::string& tmp) {
    png_image image{};
    image.version = PNG_IMAGE_VERSION;
    image.width = width, image.height = height;
    image.format = channels == 1 ? PNG_FORMAT_GRAY : PNG_FORMAT_RGB;
    image.flags = PNG_IMAGE_FLAG_FAST;
    if (!png_image_write_to_file(&image, tmp.c_str(), 0, pixels, 0, nullptr))
      throw Error("--out " + path.string() + ": cannot be written (" + image.message + ")");
  });
}

// The head of a .npy file, version 1.0: magic, length, a Python literal, padded to a multiple of 64 bytes.
static std::string npy_header(const std::string& type, const std::vector<int64_t>& shape) {
  std::string text = "{'descr': '" + type + "', 'fortran_order': False, 'shape': (";
  for (int64_t d : shape) text += std::to_string(d) + ",";
  text += "), }";
  text += std::string(63 - (10 + text.size()) % 64, ' ') + "\n";
  return std::string("\x93NUMPY\x01\x00", 8) + (char)(text.size() & 255) + (char)(text.size() >> 8) + text;
}

// A grid like torchvision's: nearly a square, or of so many columns, if not 0.
static void write_grid(const fs::path& path, const Generator& gen, const std::vector<uint8_t>& images, int64_t n,
                       int64_t columns) {
  columns = std::min(columns ? columns : (int64_t)std::ceil(std::sqrt((double)n)), n);
  const int64_t h = gen.height, w = gen.width, c = gen.channels, rows = (n + columns - 1) / columns, gap = n > 1 ? 2 : 0;
  const int64_t line = (columns * (w + gap) + gap) * c;
  std::vector<uint8_t> grid((rows * (h + gap) + gap) * line, 255);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t y = 0; y < h; ++y)
      std::memcpy(&grid[(i / columns * (h + gap) + gap + y) * line + (i % columns * (w + gap) + gap) * c],
                  &images[(i * h + y) * w * c], w * c);
  write_png(path, grid.data(), rows * (h + gap) + gap, line / c, c);
}

static void benchmark(Generator& gen, const Options& o, const std::vector<int64_t>& choice) {
  std::printf("%s: %s, %s, %s threads, ONNX Runtime %s\n%5s %9s %9s %9s %9s\n", o.model.c_str(),
              gen.metadata("precision", "unknown precision").c_str(), o.provider.c_str(),
              o.threads ? std::to_string(o.threads).c_str() : "all", Ort::GetVersionString().c_str(), "batch",
              "images/s", "p50 ms", "p95 ms", "p99 ms");
  std::vector<int64_t> sizes = gen.fixed_batch ? std::vector<int64_t>{gen.fixed_batch} : std::vector<int64_t>{1, 4, 16, 64, 256};
  for (int64_t n : sizes) {
    std::vector<float> z(n * gen.nz);
    std::vector<int64_t> labels(n);
    std::vector<uint8_t> out(n * gen.height * gen.width * gen.channels);
    latents(o.seed, o.start, n, gen.nz, z.data());
    for (int64_t i = 0; i < n; ++i) labels[i] = choice.empty() ? 0 : choice[i % choice.size()];
    std::vector<double> times;
    double total = 0;
    for (int i = 0; i < 10000 && (total < 2 || times.size() < 20) && !interrupted; ++i) {
      auto begin = std::chrono::steady_clock::now();
      gen(z.data(), labels.data(), n, out.data());
      double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
      if (i < 3) continue;  // warming up
      times.push_back(seconds);
      total += seconds;
    }
    std::sort(times.begin(), times.end());
    auto percentile = [&](double p) { return times.empty() ? 0 : 1000 * times[(size_t)(p * (times.size() - 1))]; };
    std::printf("%5lld %9.1f %9.3f %9.3f %9.3f\n", (long long)n, n * times.size() / std::max(total, 1e-9), percentile(.5),
                percentile(.95), percentile(.99));
    std::fflush(stdout);
  }
}

static void run(const Options& o) {
  const int threads = std::max(1u, std::thread::hardware_concurrency());
  const fs::path out = o.out.empty() ? fs::path(o.model).replace_extension().string() + "_samples.png" : o.out;
  const std::string suffix = out.has_filename() ? out.extension().string() : "";
  if (suffix != ".png" && suffix != ".npy" && suffix != "")
    throw Error("--out " + o.out + ": give a .png, an .npy or a folder/");
  Generator gen(o.model, (int)o.threads, o.provider == "cuda");
  const std::vector<int64_t> choice = parse_labels(o.labels, gen);
  if (o.benchmark) return benchmark(gen, o, choice);
  const int64_t n = o.n_samples ? o.n_samples : choice.empty() ? 64 : 10 * (int64_t)choice.size();
  const int64_t batch = gen.fixed_batch ? gen.fixed_batch : std::min(o.batch_size, n);
  const int64_t size = gen.height * gen.width * gen.channels;
  if (n > std::numeric_limits<int64_t>::max() / size || batch > std::numeric_limits<int64_t>::max() / size)
    throw std::bad_alloc();
  auto label_of = [&](int64_t i) { return choice.empty() ? 0 : choice[(o.start + i) % choice.size()]; };

  // Calls use(first, pictures, how many) for batches in order; a rest is filled up with latents that nobody looks at.
  auto generate = [&](const std::function<void(int64_t, const std::shared_ptr<std::vector<uint8_t>>&, int64_t)>& use) {
    std::vector<float> z(batch * gen.nz);
    std::vector<int64_t> labels(batch);
    for (int64_t i = 0; i < n; i += batch) {
      if (interrupted) throw Error("interrupted; no file is half written");
      latents(o.seed, o.start + i, batch, gen.nz, z.data());
      for (int64_t k = 0; k < batch; ++k) labels[k] = label_of(i + k);
      auto images = std::make_shared<std::vector<uint8_t>>(batch * size);
      gen(z.data(), labels.data(), batch, images->data());
      use(i, images, std::min(batch, n - i));
    }
  };

  if (suffix == ".npy") {
    auto write = [&](const fs::path& path, const std::string& header, const std::function<void(std::ofstream&)>& body) {
      atomic_write(path, [&](const std::string& tmp) {
        std::ofstream file(tmp, std::ios::binary);
        file << header;
        if (file) body(file);
        file.close();
        if (!file) throw Error("--out " + path.string() + ": cannot be written (" + std::strerror(errno) + ")");
      });
    };
    write(out, npy_header("|u1", {n, gen.height, gen.width, gen.channels}), [&](std::ofstream& file) {
      generate([&](int64_t, const auto& images, int64_t k) {
        file.write((const char*)images->data(), k * size);
        if (!file) throw Error("--out " + out.string() + ": cannot be written (" + std::strerror(errno) + ")");
      });
    });
    if (gen.n_classes) {
      fs::path path = out.parent_path() / (out.stem().string() + "_labels.npy");
      write(path, npy_header("<i8", {n}), [&](std::ofstream& file) {
        for (int64_t i = 0; i < n; ++i) {
          int64_t label = label_of(i);
          file.write((const char*)&label, sizeof label);
        }
      });
    }
  } else if (suffix == ".png") {
    std::vector<uint8_t> all(n * size);
    generate([&](int64_t i, const auto& images, int64_t k) { std::memcpy(&all[i * size], images->data(), k * size); });
    write_grid(out, gen, all, n, (int64_t)choice.size());
  } else {  // while one batch is computed, the one before it is encoded
    std::vector<std::future<void>> encoding;
    auto wait = [&] {
      for (auto& part : encoding) part.get();
      encoding.clear();
    };
    generate([&](int64_t first, const auto& images, int64_t k) {
      wait();
      for (int t = 0; t < threads; ++t)
        encoding.push_back(std::async(std::launch::async, [&gen, &o, &out, images, first, k, size, t, threads] {
          for (int64_t i = t; i < k; i += threads) {
            char name[32];
            std::snprintf(name, sizeof name, "%06lld.png", (long long)(o.start + first + i));
            write_png(out / name, images->data() + i * size, gen.height, gen.width, gen.channels);
          }
        }));
    });
    wait();
  }
  std::cout << "wrote " << out.string() << std::endl;
}

int main(int argc, char** argv) {
  for (int signal : {SIGINT, SIGTERM}) std::signal(signal, [](int) { interrupted = 1; });
  std::signal(SIGXFSZ, SIG_IGN);  // too large a file is an error of write(), and says so
  std::string message, no_memory = "not enough memory; lower --batch_size or, for a grid, --n_samples";
  try {
    run(parse(argc, argv));
    return 0;
  } catch (const Ort::Exception&) {
    message = "the model cannot be run: it is damaged, or the memory does not suffice (try --batch_size 16)";
  } catch (const std::bad_alloc&) {
    message = no_memory;
  } catch (const std::length_error&) {  // a vector of more than there can be
    message = no_memory;
  } catch (const std::exception& e) {
    message = e.what();
  }
  std::replace(message.begin(), message.end(), '\n', ' ');  // a file's name may hold one
  std::cerr << "infer_ort: error: " << message << std::endl;
  return message.rfind("--", 0) == 0 ? 2 : 1;
}
