// Pictures from an ONNX file that export.py wrote: C++17, ONNX Runtime and libpng.
//
//   cmake -S deploy -B build && cmake --build build
//   build/infer_ort model.onnx                                      a grid, beside the model
//   build/infer_ort model.onnx --n_samples 50000 --out samples.npy  uint8 (N, H, W, C)
//   build/infer_ort model.onnx --labels cat,7 --out folder/         PNG files, classes in turn
//
// Picture i of a seed is that of infer_ort.py and of --sample of the training scripts. To embed a
// generator, copy what stands above "command line": latents() and class Generator.

#include <onnxruntime_cxx_api.h>
#include <png.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <future>
#include <iostream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace fs = std::filesystem;
using Error = std::runtime_error;  // what the user can mend, in one line

// The upper half of the product of two 64-bit numbers, from products of their halves.
inline uint64_t multiply_high(uint64_t a, uint64_t b) {
  const uint64_t a_low = uint32_t(a), a_high = a >> 32, b_low = uint32_t(b), b_high = b >> 32;
  const uint64_t middle = a_high * b_low + (a_low * b_low >> 32);
  return a_high * b_high + (middle >> 32) + ((a_low * b_high + uint32_t(middle)) >> 32);
}

// Philox4x64-10 (Salmon et al. 2011): four words of 64 bits for a counter.
inline std::array<uint64_t, 4> philox(uint64_t counter, uint64_t key) {
  const uint64_t m0 = 0xD2E7470EE14C6C93, m1 = 0xCA5A826395121157;
  std::array<uint64_t, 4> c = {counter, 0, 0, 0};
  uint64_t k0 = key, k1 = 0;
  for (int round = 0; round < 10; ++round) {
    c = {multiply_high(c[2], m1) ^ c[1] ^ k0, c[2] * m1,
         multiply_high(c[0], m0) ^ c[3] ^ k1, c[0] * m0};
    k0 += 0x9E3779B97F4A7C15;
    k1 += 0xBB67AE8584CAA73B;
  }
  return c;
}

// Latents start to start + n - 1 of a seed, (n, nz) ~ N(0, 1): latents() of infer_ort.py says how.
inline std::vector<float> latents(uint64_t seed, uint64_t start, int64_t n, int64_t nz) {
  const int64_t blocks = (nz + 3) / 4;
  std::vector<float> z(n * nz);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < nz; k += 2) {
      const auto words = philox((start + i) * blocks + k / 4 + 1, seed);
      const double u1 = ((words[k % 4] >> 11) + 0.5) * 0x1p-53;
      const double u2 = ((words[k % 4 + 1] >> 11) + 0.5) * 0x1p-53;
      const double r = std::sqrt(-2 * std::log(u1));
      const double t = 2 * 3.14159265358979323846 * u2;
      z[i * nz + k] = float(r * std::cos(t));
      if (k + 1 < nz) z[i * nz + k + 1] = float(r * std::sin(t));
    }
  return z;
}

// The whole number in a text. what: the flag or the entry of a file that it comes from.
inline int64_t to_number(std::string what, std::string text, int64_t low, int64_t high) {
  const int64_t value = std::strtoll(text.c_str(), nullptr, 10);
  if (std::to_string(value) == text && low <= value && value <= high) return value;
  const std::string range = std::to_string(low) + " to " + std::to_string(high);
  throw Error(what + " " + text + ": not a whole number from " + range);
}

// The strings in a JSON list that Python wrote: ASCII, with \uXXXX of UTF-16 for other letters.
inline std::vector<std::u16string> parse_names(const std::string& json) {
  std::vector<std::u16string> names;
  for (size_t i = json.find('"'); i < json.size(); i = json.find('"', i + 1)) {
    std::u16string name;
    while (++i < json.size() && json[i] != '"') {
      if (json.compare(i, 2, "\\u") == 0) {
        name += char16_t(std::strtoul(json.substr(i + 2, 4).c_str(), nullptr, 16));
        i += 5;
      } else {
        if (json[i] == '\\') ++i;
        name += json[i];
      }
    }
    names.push_back(name);
  }
  return names;
}

// A file that export.py wrote: (n, nz) latents, and n labels if it has classes, to uint8 pictures
// (n, size, size, channels). Several threads may use one object. Throws Error and Ort::Exception.
class Generator {
 public:
  // provider: cpu, cuda or tensorrt; threads: of the CPU, 0 for ONNX Runtime's choice.
  explicit Generator(const fs::path& path, const std::string& provider = "cpu", int threads = 0)
      : provider(provider), path_(path.string()) {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(threads);
    if (provider == "tensorrt") options.AppendExecutionProvider_TensorRT({});
    if (provider == "cuda" || provider == "tensorrt") options.AppendExecutionProvider_CUDA({});
    else if (provider != "cpu") throw Error("--provider " + provider + ": no such; see --help");
    session_ = Ort::Session(env_, path.c_str(), options);
    if (metadata("format_version") != "1")
      throw Error(path_ + ": not written by this export.py; write a file with python export.py");
    nz = to_number(path_ + ": nz", metadata("nz"), 1, 1 << 14);  // no product of such overflows
    size = to_number(path_ + ": img_size", metadata("img_size"), 1, 1 << 14);
    channels = to_number(path_ + ": nc", metadata("nc"), 1, 4);
    classes = parse_names(metadata("classes"));
    if (metadata("n_classes") != std::to_string(classes.size()))
      throw Error(path_ + ": n_classes is not the number of its classes; export it again");
  }

  std::vector<uint8_t> operator()(std::vector<float> z, std::vector<int64_t> labels = {}) {
    const int64_t n = z.size() / nz;
    const int64_t shape[] = {n, nz};
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    std::vector<Ort::Value> inputs;
    inputs.push_back(Ort::Value::CreateTensor(memory, z.data(), z.size(), shape, 2));
    if (!classes.empty())
      inputs.push_back(Ort::Value::CreateTensor(memory, labels.data(), labels.size(), &n, 1));
    const char* names[] = {"z", "labels"};
    const char* output = "images";
    const auto images = session_.Run({}, names, inputs.data(), inputs.size(), &output, 1);
    return to_pixels(images[0], n);
  }

  // What the file says of itself; nothing where it does not.
  std::string metadata(const char* key) const {
    Ort::AllocatorWithDefaultOptions memory;
    const auto value = session_.GetModelMetadata().LookupCustomMetadataMapAllocated(key, memory);
    return value ? value.get() : "";
  }

  int64_t bytes() const { return size * size * channels; }  // of a picture
  int64_t nz, channels, size;
  std::vector<std::u16string> classes;  // their names; none: it takes no labels
  std::string provider;

 private:
  // uint8 (n, size, size, channels) as they are; or float (n, channels, size, size) in [-1, 1].
  std::vector<uint8_t> to_pixels(const Ort::Value& images, int64_t n) const {
    const size_t count = n * bytes();
    const auto info = images.GetTensorTypeAndShapeInfo();
    const auto type = info.GetElementType();
    const bool uint8 = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    if ((!uint8 && type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) || info.GetElementCount() != count)
      throw Error(path_ + ": its pictures are not as its metadata says; export it again");
    const uint8_t* raw = images.GetTensorData<uint8_t>();
    if (uint8) return {raw, raw + count};
    const float* x = images.GetTensorData<float>();
    std::vector<uint8_t> pixels(count);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t p = 0; p < size * size; ++p)
          pixels[i * bytes() + p * channels + c] = to_byte(*x++);
    return pixels;
  }

  uint8_t to_byte(float x) const {
    if (!std::isfinite(x)) throw Error(path_ + ": its pictures are not finite; train it again");
    return uint8_t(std::clamp(x * 127.5f + 128, 0.0f, 255.0f));
  }

  std::string path_;
  Ort::Env env_{ORT_LOGGING_LEVEL_FATAL, "infer_ort"};
  Ort::Session session_{nullptr};
};

// ------------------------------------------------------------------------------------ command line

static const char* usage =
    "usage: infer_ort MODEL.onnx [--n_samples N] [--batch_size N] [--seed N] [--start N]\n"
    "           [--labels cat,7] [--walk_dim D] [--out FILE.png|FILE.npy|FOLDER/] [--threads N]\n"
    "           [--provider auto|cpu|cuda|tensorrt]    auto: CUDA, but the CPU for int8\n";

using Options = std::map<std::string, std::string>;  // flags and what they are set to

static Options parse(int argc, char** argv) {
  Options o = {{"--n_samples", ""}, {"--batch_size", "32"}, {"--seed", "0"}, {"--start", "0"},
               {"--labels", ""}, {"--walk_dim", ""}, {"--out", ""}, {"--provider", "auto"},
               {"--threads", "0"}, {"MODEL", ""}};
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag[0] != '-' && o["MODEL"].empty()) o["MODEL"] = flag;
    else if (!o.count(flag)) throw Error(flag + ": not a flag; --help lists them");
    else if (++i == argc || argv[i][0] == '-') throw Error(flag + ": needs a value");
    else o[flag] = argv[i];
  }
  if (o["MODEL"].empty()) throw Error("name a MODEL.onnx; --help lists the flags");
  return o;
}

// The CPU first: what fails there is the file's fault. auto then tries CUDA, but not for int8.
static Generator open_generator(const Options& o) {
  const std::string model = o.at("MODEL"), asked = o.at("--provider");
  const int threads = to_number("--threads", o.at("--threads"), 0, 1024);
  Generator gen(model, "cpu", threads);
  const std::string precision = gen.metadata("precision");
  const std::string gpu = asked == "auto" ? "cuda" : asked;
  const bool spared = asked == "auto" && precision == "int8";
  std::string why = spared ? ", where int8 is fast" : "";
  try {
    if (asked != "cpu" && !spared) gen = Generator(model, gpu, threads);
  } catch (const Ort::Exception& e) {
    why = std::string(e.what()) + "; needs a GPU, and CUDA in LD_LIBRARY_PATH";
    if (asked != "auto") throw Error("--provider " + gpu + ": " + why + ", or take --provider cpu");
    why = ", no GPU: " + why;
  }
  std::cout << model << ": " << precision << " on " << gen.provider << why << std::endl;
  return gen;
}

// The classes of --labels, by default all; by name first: class folders 0 to 11 sort as 0, 1, 10.
static std::vector<int64_t> choose(const std::string& labels, const Generator& gen) {
  const int64_t n = gen.classes.size();
  if (n == 0 && labels != "") throw Error("--labels: this file has no classes; leave it out");
  const std::string what = "--labels: of the classes " + gen.metadata("classes") + " none is";
  std::vector<int64_t> chosen;
  std::istringstream names(labels);
  for (std::string name; std::getline(names >> std::ws, name, ',');) {
    const auto found = std::find(gen.classes.begin(), gen.classes.end(), fs::path(name).u16string());
    if (found != gen.classes.end()) chosen.push_back(found - gen.classes.begin());
    else chosen.push_back(to_number(what, name, 0, n - 1));
  }
  if (chosen.empty())
    for (int64_t k = 0; k < n; ++k) chosen.push_back(k);
  return chosen;
}

static void write_png(const fs::path& path, const uint8_t* pixels, int height, int width, int nc) {
  png_image image{};
  image.version = PNG_IMAGE_VERSION;
  image.width = width;
  image.height = height;
  image.format = nc - 1;  // libpng's gray, gray and alpha, RGB, RGBA
  image.flags = PNG_IMAGE_FLAG_FAST;
  if (!png_image_write_to_file(&image, path.string().c_str(), 0, pixels, 0, nullptr))
    throw Error("--out " + path.string() + ": " + image.message);
}

static std::string png_name(int64_t number) {
  const std::string digits = std::to_string(number);
  return std::string(6 - std::min<size_t>(6, digits.size()), '0') + digits + ".png";
}

// The n pictures that a command asks for, one after the other; they are made in batches.
class Pictures {
 public:
  Pictures(Generator& generator, const Options& o)
      : gen(generator), choice(choose(o.at("--labels"), gen)) {
    n = choice.empty() ? 64 : 10 * choice.size();
    if (o.at("--n_samples") != "") n = to_number("--n_samples", o.at("--n_samples"), 1, 1e9);
    if (o.at("--walk_dim") != "") walk = to_number("--walk_dim", o.at("--walk_dim"), 0, gen.nz - 1);
    batch = std::min(n, to_number("--batch_size", o.at("--batch_size"), 1, 1e6));
    seed = to_number("--seed", o.at("--seed"), 0, INT64_MAX);
    start = to_number("--start", o.at("--start"), 0, 1e15);
  }

  // Version 1.0 of .npy: magic, length of the head (118), a Python literal, the pictures.
  void write_array(const fs::path& path) {
    std::string head = "{'descr': '|u1', 'fortran_order': False, 'shape': (";
    for (int64_t d : {n, gen.size, gen.size, gen.channels}) head += std::to_string(d) + ",";
    head += "), }";
    head.resize(117, ' ');
    std::ofstream file;
    file.exceptions(std::ios::failbit | std::ios::badbit);
    file.open(path, std::ios::binary);
    file << std::string("\x93NUMPY\x01\x00\x76\x00", 10) << head << "\n";
    for (int64_t i = 0; i < n; ++i) file.write((const char*)picture(i), gen.bytes());
    file.close();
  }

  // A grid like torchvision's: nearly a square, or a column for each class.
  void write_grid(const fs::path& path) {
    const int64_t square = std::ceil(std::sqrt(double(n)));
    const int64_t columns = std::min<int64_t>(n, choice.empty() ? square : choice.size());
    const int64_t gap = n > 1 ? 2 : 0, step = gen.size + gap;
    const int64_t width = columns * step + gap;
    const int64_t height = (n + columns - 1) / columns * step + gap;
    const int64_t line = gen.size * gen.channels;  // bytes in a line of a picture
    std::vector<uint8_t> grid(height * width * gen.channels, 255);
    for (int64_t i = 0; i < n; ++i) {
      const uint8_t* from = picture(i);
      const int64_t top = i / columns * step + gap, left = i % columns * step + gap;
      for (int64_t y = 0; y < gen.size; ++y)
        std::copy_n(from + y * line, line, &grid[((top + y) * width + left) * gen.channels]);
    }
    write_png(path, grid.data(), height, width, gen.channels);
  }

  void write_folder(const fs::path& folder) {
    fs::create_directories(folder);
    int64_t others = 0;  // which somebody might take for this command's
    for (const auto& entry : fs::directory_iterator(folder))
      if (entry.path().extension() == ".png") ++others;
    for (int64_t i = 0; i < n && others; ++i)
      if (fs::exists(folder / png_name(start + i))) --others;
    if (others)
      std::cerr << folder.string() << ": " << others << " other PNG files lie there, too" << std::endl;
    std::vector<std::future<void>> writing;  // some at once
    const auto wait = [&] {
      for (auto& one : writing) one.get();
      writing.clear();
    };
    for (int64_t i = 0; i < n; ++i) {
      if (i % batch == 0 || writing.size() == 16) wait();  // a new batch takes the old one's place
      writing.push_back(std::async(std::launch::async, write_png, folder / png_name(start + i),
                                   picture(i), gen.size, gen.size, gen.channels));
    }
    wait();
  }

 private:
  const uint8_t* picture(int64_t i) {
    if (i % batch == 0) make_batch(i);
    return &made[i % batch * gen.bytes()];
  }

  void make_batch(int64_t first) {
    // A new shape costs time on a GPU: the last batch is filled up there.
    const int64_t end = gen.provider == "cpu" ? std::min(first + batch, n) : first + batch;
    std::vector<float> z;
    std::vector<int64_t> labels;
    for (int64_t i = first; i < end; ++i) {
      auto one = latents(seed, walk < 0 ? start + i : start, 1, gen.nz);
      if (walk >= 0) one[walk] += 0.01 * i;
      z.insert(z.end(), one.begin(), one.end());
      if (!choice.empty()) labels.push_back(choice[(start + i) % choice.size()]);
    }
    made = gen(z, labels);
  }

  Generator& gen;
  const std::vector<int64_t> choice;  // classes, in turn; none: it takes no labels
  int64_t n, batch, seed, start, walk = -1;  // -1: no walk
  std::vector<uint8_t> made;
};

static void run(const Options& o) {
  fs::path out = o.at("--out");
  if (out.empty()) out = fs::path(o.at("MODEL")).replace_extension().concat("_samples.png");
  const std::string kind = out.extension().string();
  Generator gen = open_generator(o);
  Pictures pictures(gen, o);
  if (kind == ".npy") pictures.write_array(out);
  else if (kind == ".png") pictures.write_grid(out);
  else if (kind == "") pictures.write_folder(out);
  else throw Error("--out " + out.string() + ": give a .png, an .npy or a folder/");
  std::cout << "wrote " << out.string() << std::endl;
}

int main(int argc, char** argv) {
  if (argc == 2 && std::string(argv[1]) == "--help") return (std::cout << usage) ? 0 : 1;
  Options o;
  std::string why;
  try {
    o = parse(argc, argv);
    run(o);
    return 0;
  } catch (const Ort::Exception& e) {
    why = o["MODEL"] + ": " + e.what();
    why += "; take a file of export.py, a smaller --batch_size or --provider cpu";
  } catch (const std::ios::failure&) {
    why = "--out " + o["--out"] + ": cannot be written; no such folder, or no room";
  } catch (const std::bad_alloc&) {
    why = "not enough memory; lower --n_samples or --batch_size";
  } catch (const std::exception& e) {
    why = e.what();
  }
  std::replace(why.begin(), why.end(), '\n', ' ');
  std::cerr << "infer_ort: error: " << why << std::endl;
  return 1;
}
