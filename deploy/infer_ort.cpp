// Pictures from an ONNX generator that export.py wrote, or anybody's, in C++17 with ONNX Runtime and libpng.
//
//   cmake -S deploy -B build && cmake --build build
//   build/infer_ort model.onnx                                             a grid, beside the model
//   build/infer_ort model.onnx --n_samples 50000 --out samples.npy         uint8 (N, H, W, C)
//   build/infer_ort model.onnx --n_samples 1000 --labels 3,7 --out folder/
//   build/infer_ort model.onnx --benchmark
//
// Somebody else's generators: z float32 (N, nz) or (N, nz, 1, 1), labels int64 (N), pictures float32 or uint8.
// To embed a generator, copy what stands above "command line": latents() and class Generator. Picture i of a seed is
// that of infer_ort.py and of --sample of the training scripts.

#include <onnxruntime_cxx_api.h>
#include <png.h>

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
  const uint64_t a_low = a & 0xFFFFFFFF, a_high = a >> 32, b_low = b & 0xFFFFFFFF, b_high = b >> 32;
  const uint64_t middle = a_high * b_low + (a_low * b_low >> 32);
  return a_high * b_high + (middle >> 32) + ((a_low * b_high + (middle & 0xFFFFFFFF)) >> 32);
}

// Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): four words for a counter.
inline std::array<uint64_t, 4> philox(uint64_t counter, uint64_t key) {
  const uint64_t m0 = 0xD2E7470EE14C6C93, m1 = 0xCA5A826395121157;
  std::array<uint64_t, 4> c = {counter, 0, 0, 0};
  uint64_t k0 = key, k1 = 0;
  for (int round = 0; round < 10; ++round) {
    c = {multiply_high(c[2], m1) ^ c[1] ^ k0, c[2] * m1, multiply_high(c[0], m0) ^ c[3] ^ k1, c[0] * m0};
    k0 += 0x9E3779B97F4A7C15;
    k1 += 0xBB67AE8584CAA73B;
  }
  return c;
}

// Latents start to start + n - 1 of a seed, (n, nz) ~ N(0, 1), the same as latents() of the Python scripts: latent i
// takes ceil(nz / 4) blocks from counter 1 + i * ceil(nz / 4) on; u = (upper 53 bits + 1/2) / 2^53; Box-Muller.
inline void latents(uint64_t seed, uint64_t start, int64_t n, int64_t nz, float* out) {
  const int64_t blocks = (nz + 3) / 4;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t block = 0; block < blocks; ++block) {
      const auto words = philox((start + i) * blocks + block + 1, seed);
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
  explicit Generator(const fs::path& path, int threads = 0, bool cuda = false) : path_(path.string()) {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(threads);
    if (cuda) options.AppendExecutionProvider_CUDA(OrtCUDAProviderOptions{});
    session_ = Ort::Session(env_, path.c_str(), options);
    Ort::AllocatorWithDefaultOptions allocator;
    for (size_t i = 0; i < session_.GetInputCount(); ++i) {  // in any order: z is float, labels are integers
      inputs_.push_back(session_.GetInputNameAllocated(i, allocator).get());
      const auto [type, shape] = tensor_of(session_.GetInputTypeInfo(i));
      if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 && shape.size() == 1) {
        labels_input_ = (int)i;
        n_classes = std::atoll(metadata("n_classes", std::to_string(any_class)).c_str());
        demand(n_classes > 0);
        continue;
      }
      demand(type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT && (shape.size() == 2 || shape.size() == 4) && shape[1] > 0);
      demand(shape.size() == 2 || (shape[2] == 1 && shape[3] == 1));
      nz = shape[1];
      fixed_batch = std::max<int64_t>(shape[0], 0);
      z_shape_ = shape;
    }
    demand(nz && inputs_.size() == (labels_input_ < 0 ? 1 : 2));
    output_ = session_.GetOutputNameAllocated(0, allocator).get();
    const auto [type, shape] = tensor_of(session_.GetOutputTypeInfo(0));
    uint8_ = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    demand(shape.size() == 4 && (uint8_ || type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT));
    nhwc_ = shape[1] != 1 && shape[1] != 3;  // the axis of 1 or 3 channels tells NCHW from NHWC
    channels = shape[nhwc_ ? 3 : 1];
    height = shape[nhwc_ ? 1 : 2];
    width = shape[nhwc_ ? 2 : 3];
    demand((channels == 1 || channels == 3) && std::min(height, width) > 0 && std::max(height, width) <= 1 << 14);
    if (metadata("format_version", "1") != "1")
      throw Error(path_ + ": of another format, made by another export.py; take the infer_ort.cpp beside that one");
  }

  // z: n * nz floats; labels: n numbers, ignored by a generator without classes; out: n * height * width * channels.
  void operator()(const float* z, const int64_t* labels, int64_t n, uint8_t* out) {
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    std::vector<int64_t> shape = z_shape_;
    shape[0] = n;
    std::vector<Ort::Value> values;
    std::vector<const char*> names;
    for (size_t i = 0; i < inputs_.size(); ++i) {  // ONNX Runtime only reads them, but asks for no const
      names.push_back(inputs_[i].c_str());
      if ((int)i == labels_input_)
        values.push_back(Ort::Value::CreateTensor(memory, const_cast<int64_t*>(labels), n, &n, 1));
      else
        values.push_back(Ort::Value::CreateTensor(memory, const_cast<float*>(z), n * nz, shape.data(), shape.size()));
    }
    const char* output = output_.c_str();
    auto result = session_.Run(Ort::RunOptions{nullptr}, names.data(), values.data(), values.size(), &output, 1);
    const int64_t pixels = height * width, count = n * pixels * channels;
    if ((int64_t)result[0].GetTensorTypeAndShapeInfo().GetElementCount() != count)
      throw Error(path_ + ": its output has another shape than it states");
    auto put = [&](const auto* x, auto convert) {
      if (nhwc_) std::transform(x, x + count, out, convert);
      else for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < channels; ++c, x += pixels)
          for (int64_t p = 0; p < pixels; ++p) out[(i * pixels + p) * channels + c] = convert(x[p]);
    };
    if (uint8_) return put(result[0].GetTensorData<uint8_t>(), [](uint8_t v) { return v; });
    const float* x = result[0].GetTensorData<float>();
    if (!std::all_of(x, x + count, [](float v) { return std::isfinite(v); }))
      throw Error(path_ + ": makes pictures that are not finite; it is damaged, or its training diverged");
    // the one conversion, the same in the training scripts and in a graph with --uint8
    put(x, [](float v) { return (uint8_t)std::clamp(v * 127.5f + 128.0f, 0.0f, 255.0f); });
  }

  std::string metadata(const char* key, const std::string& otherwise) const {
    Ort::AllocatorWithDefaultOptions allocator;
    auto value = session_.GetModelMetadata().LookupCustomMetadataMapAllocated(key, allocator);
    return value ? value.get() : otherwise;
  }

  static constexpr int64_t any_class = INT64_MAX;
  int64_t nz = 0, channels = 0, height = 0, width = 0;
  int64_t n_classes = 0;    // 0: takes no labels; any_class: the file does not say
  int64_t fixed_batch = 0;  // 0: any

 private:
  void demand(bool holds) const {
    if (!holds)
      throw Error(path_ + ": no generator; it should have z (N, nz) in, labels (N) if it has classes, and pictures of "
                  "1 or 3 channels out, (N, C, H, W) or (N, H, W, C)");
  }

  // Element type and shape, -1 where any size will do; no type for what is no tensor.
  static std::pair<ONNXTensorElementDataType, std::vector<int64_t>> tensor_of(const Ort::TypeInfo& info) {
    if (info.GetONNXType() != ONNX_TYPE_TENSOR) return {ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, {}};
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

// -------------------------------------------------------------------------------------------------- command line

static volatile std::sig_atomic_t interrupted = 0;

struct Options {
  std::string model, out, labels, provider = "cpu";
  int64_t n_samples = 0, batch_size = 32, start = 0, threads = 0;  // 32: as fast as 64 on a CPU, in less memory
  uint64_t seed = 0;
  bool benchmark = false, help = false;
};

static const char* help =
    "usage: infer_ort MODEL.onnx [--n_samples N] [--batch_size N] [--seed N] [--start N] [--labels 0,3,7|all]\n"
    "                 [--out FILE.png|FILE.npy|FOLDER/] [--threads N] [--provider cpu|cuda] [--benchmark]\n"
    "Picture i of a seed is the same whatever the other flags. Default: a grid beside the model.\n";

static int64_t number(const std::string& flag, const std::string& text, int64_t low, int64_t high) {
  int64_t value = -1;  // as it stays if the text is no number, or too large a one
  const char* end = text.data() + text.size();
  if (std::from_chars(text.data(), end, value).ptr == end && value >= low && value <= high) return value;
  throw Error(flag + " " + text + ": give a whole number from " + std::to_string(low) + " to " + std::to_string(high));
}

static Options parse(int argc, char** argv) {
  Options o;
  const int64_t most = int64_t(1) << 53;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    auto text = [&]() -> std::string {
      if (++i < argc) return argv[i];
      throw Error(flag + ": needs a value");
    };
    auto value = [&](int64_t low, int64_t high) { return number(flag, text(), low, high); };
    if (flag == "--n_samples") o.n_samples = value(1, most);
    else if (flag == "--batch_size") o.batch_size = value(1, most);
    else if (flag == "--seed") o.seed = value(0, INT64_MAX);
    else if (flag == "--start") o.start = value(0, most);
    else if (flag == "--threads") o.threads = value(0, 1024);
    else if (flag == "--labels") o.labels = text();
    else if (flag == "--out") o.out = text();
    else if (flag == "--provider") o.provider = text();
    else if (flag == "--benchmark") o.benchmark = true;
    else if (flag == "--help" || flag == "-h") o.help = true;
    else if (flag.rfind("--", 0) == 0 || !o.model.empty()) throw Error("--help lists the flags; " + flag + " is none");
    else o.model = flag;
  }
  if (o.provider != "cpu" && o.provider != "cuda") throw Error("--provider " + o.provider + ": choose cpu or cuda");
  if (o.model.empty() && !o.help) throw Error("--help lists the flags; name a MODEL.onnx");
  return o;
}

// The classes that --labels names, which the pictures take in turn; none for a generator without classes.
static std::vector<int64_t> parse_labels(const std::string& text, const Generator& gen) {
  std::vector<int64_t> chosen;
  if (!gen.n_classes && !text.empty()) throw Error("--labels " + text + ": this generator knows no classes");
  if (text.empty() || text == "all") {
    if (gen.n_classes == Generator::any_class)
      throw Error("--labels: this file does not say how many classes it knows; name some, such as --labels 0,1,2");
    for (int64_t k = 0; k < gen.n_classes; ++k) chosen.push_back(k);
    return chosen;
  }
  std::istringstream names(text + ",");
  for (std::string name; std::getline(names, name, ',');)
    chosen.push_back(number("--labels", name, 0, gen.n_classes - 1));
  return chosen;
}

// Calls write(file) with a temporary name, then gives the file its own: nobody ever sees half a file.
static void write_file(const fs::path& path, const std::function<void(std::ofstream&)>& write) {
  static const std::string unique = std::to_string(std::random_device{}());  // two programs may write to one folder
  const fs::path temporary = path.parent_path() / ("." + path.filename().string() + "." + unique + ".tmp");
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

static void write_png(const fs::path& path, const uint8_t* pixels, int64_t height, int64_t width, int64_t channels) {
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

// The head of a .npy file, version 1.0: magic, length, a Python literal, padded to a multiple of 64 bytes.
static std::string npy_header(const std::string& type, const std::vector<int64_t>& shape) {
  std::string text = "{'descr': '" + type + "', 'fortran_order': False, 'shape': (";
  for (int64_t d : shape) text += std::to_string(d) + ",";
  text += "), }";
  text += std::string(63 - (10 + text.size()) % 64, ' ') + "\n";
  return std::string("\x93NUMPY\x01\x00", 8) + (char)(text.size() & 255) + (char)(text.size() >> 8) + text;
}

// n pictures of a generator, and the ways to write them.
struct Samples {
  Generator& gen;
  const Options& o;
  const std::vector<int64_t> choice;
  const int64_t n = o.n_samples ? o.n_samples : choice.empty() ? 64 : 10 * (int64_t)choice.size();
  const int64_t batch = gen.fixed_batch ? gen.fixed_batch : std::min(o.batch_size, n);
  const int64_t size = gen.height * gen.width * gen.channels;

  int64_t label(int64_t i) const { return choice.empty() ? 0 : choice[(o.start + i) % choice.size()]; }

  // Calls use(first, images, how many) for batches in order; a rest is filled up with latents that nobody looks at.
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

  void write_array(const fs::path& path) const {
    write_file(path, [&](std::ofstream& file) {
      file << npy_header("|u1", {n, gen.height, gen.width, gen.channels});
      generate([&](int64_t, auto& images, int64_t count) { file.write((const char*)images.data(), count * size); });
    });
    if (!gen.n_classes) return;
    write_file(path.parent_path() / (path.stem().string() + "_labels.npy"), [&](std::ofstream& file) {
      file << npy_header("<i8", {n});
      for (int64_t i = 0; i < n; ++i) {
        const int64_t k = label(i);
        file.write((const char*)&k, sizeof k);
      }
    });
  }

  // A grid like torchvision's: nearly a square, or a column for each class.
  void write_grid(const fs::path& path) const {
    int64_t columns = choice.empty() ? (int64_t)std::ceil(std::sqrt((double)n)) : (int64_t)choice.size();
    columns = std::min(columns, n);
    const int64_t rows = (n + columns - 1) / columns, gap = n > 1 ? 2 : 0, row = gen.width * gen.channels;
    const int64_t width = columns * (gen.width + gap) + gap, height = rows * (gen.height + gap) + gap;
    std::vector<uint8_t> grid(height * width * gen.channels, 255);
    generate([&](int64_t first, const auto& images, int64_t count) {
      for (int64_t i = first; i < first + count; ++i)
        for (int64_t y = 0; y < gen.height; ++y) {
          const int64_t top = i / columns * (gen.height + gap) + gap + y, left = i % columns * (gen.width + gap) + gap;
          std::memcpy(&grid[(top * width + left) * gen.channels], &images[(i - first) * size + y * row], row);
        }
    });
    write_png(path, grid.data(), height, width, gen.channels);
  }

  // While one batch is computed, the one before it is encoded.
  void write_folder(const fs::path& path) const {
    const int threads = std::max(1u, std::thread::hardware_concurrency());
    std::vector<uint8_t> previous;
    std::vector<std::future<void>> encoding;
    auto wait = [&] {
      for (auto& part : encoding) part.get();
      encoding.clear();
    };
    generate([&](int64_t first, auto& images, int64_t count) {
      wait();
      previous.swap(images);
      for (int t = 0; t < threads; ++t)
        encoding.push_back(std::async(std::launch::async, [&, first, count, t] {
          for (int64_t i = t; i < count; i += threads) {
            char name[32];
            std::snprintf(name, sizeof name, "%06lld.png", (long long)(o.start + first + i));
            write_png(path / name, &previous[i * size], gen.height, gen.width, gen.channels);
          }
        }));
    });
    wait();
  }

  void benchmark() const {
    std::printf("%s: %s, %s, %s threads, ONNX Runtime %s\nbatch  images/s    p50 ms    p95 ms    p99 ms\n",
                o.model.c_str(), gen.metadata("precision", "unknown precision").c_str(), o.provider.c_str(),
                o.threads ? std::to_string(o.threads).c_str() : "all", Ort::GetVersionString().c_str());
    for (int64_t k : gen.fixed_batch ? std::vector{gen.fixed_batch} : std::vector<int64_t>{1, 4, 16, 64, 256}) {
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
        const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - begin;
        if (i < 3) continue;  // warming up
        times.push_back(taken.count());
        total += taken.count();
      }
      std::sort(times.begin(), times.end());
      auto percentile = [&](double p) { return times[(size_t)(p * (times.size() - 1))]; };
      std::printf("%5lld %9.1f %9.3f %9.3f %9.3f\n", (long long)k, 1000 * k * times.size() / total, percentile(.5),
                  percentile(.95), percentile(.99));
    }
  }
};

static void run(const Options& o) {
  const fs::path out = o.out.empty() ? fs::path(o.model).replace_extension().string() + "_samples.png" : o.out;
  const std::string suffix = out.has_filename() ? out.extension().string() : "";
  if (suffix != ".png" && suffix != ".npy" && suffix != "")
    throw Error("--out " + o.out + ": give a .png, an .npy or a folder/");
  Generator gen(o.model, (int)o.threads, o.provider == "cuda");
  const Samples samples{gen, o, parse_labels(o.labels, gen)};
  if (std::max(samples.n, samples.batch) > (int64_t(1) << 58) / samples.size) throw std::bad_alloc();
  if (o.benchmark) return samples.benchmark();
  if (suffix == ".npy") samples.write_array(out);
  else if (suffix == ".png") samples.write_grid(out);
  else samples.write_folder(out);
  std::cout << "wrote " << out.string() << std::endl;
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
  } catch (const Ort::Exception& e) {  // the end of its message says why, what stands before it where in ONNX Runtime
    const std::string why = e.what();
    message = (o.provider == "cuda" ? "--provider cuda, which needs ONNX Runtime's GPU build, CUDA and cuDNN: " : "") +
              o.model + ": cannot be loaded or run: " + (why.size() > 200 ? "..." + why.substr(why.size() - 200) : why);
  } catch (const std::bad_alloc&) {
    message = "not enough memory; lower --batch_size or, for a grid, --n_samples";
  } catch (const std::exception& e) {
    message = e.what();
  }
  std::replace_if(message.begin(), message.end(), [](unsigned char c) { return c < ' '; }, ' ');  // line breaks
  std::cerr << "infer_ort: error: " << message << std::endl;
  return message.rfind("--", 0) == 0 ? 2 : 1;
}
