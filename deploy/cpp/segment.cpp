// Writes a photo's class map with ONNX Runtime and a file of `export.py checkpoint=best.ckpt results=semantic`.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

const char* const USAGE =
    "usage: segment FILE.onnx PHOTO.ppm CLASSES.png\n"
    "Writes the class index of every pixel as a grey PNG, and prints index, share of pixels and name of each class.\n"
    "FILE.onnx   of export.py checkpoint=best.ckpt results=semantic\n"
    "PHOTO.ppm   binary PPM of 8 bits: magick photo.jpg -auto-orient -depth 8 photo.ppm (older: convert), or\n"
    "            python -c \"from PIL import Image, ImageOps; \\\n"
    "            ImageOps.exif_transpose(Image.open('photo.jpg')).convert('RGB').save('photo.ppm')\"\n";

struct Image {
    int64_t width, height;
    std::vector<uint8_t> pixels;  // RGB, row by row
};

// The next number of a PPM header, in which # begins a comment; 0 if there is none.
int64_t header_number(std::istream& file) {
    while ((file >> std::ws).peek() == '#') file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
    int64_t number = 0;
    file >> number;
    return number;
}

Image read_ppm(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error(path + " does not exist or may not be read");
    std::array<char, 2> magic{};
    file.read(magic.data(), magic.size());
    Image image{header_number(file), header_number(file), {}};
    const int64_t largest = header_number(file), limit = 1 << 15;
    if (magic != std::array<char, 2>{'P', '6'} || largest != 255 || image.width < 1 || image.height < 1 ||
        image.width > limit || image.height > limit)
        throw std::runtime_error(path + " is no binary PPM of 8 bits and at most 32768 x 32768 pixels: " +
                                 "convert it by magick " + path + " -auto-orient -depth 8 photo.ppm");
    file.get();  // the one blank before the pixels
    image.pixels.resize(image.width * image.height * 3);
    if (!file.read(reinterpret_cast<char*>(image.pixels.data()), image.pixels.size()))
        throw std::runtime_error(path + " is cut off: convert the photo again");
    return image;
}

void append_u32(std::string& bytes, uint32_t number) {
    for (int shift = 24; shift >= 0; shift -= 8) bytes += static_cast<char>(number >> shift);
}

void append_chunk(std::string& png, const std::string& type_and_data) {
    uint32_t crc = 0xffffffff;
    for (const unsigned char byte : type_and_data) {
        crc ^= byte;
        for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0xedb88320 : 0);
    }
    append_u32(png, type_and_data.size() - 4);
    png += type_and_data;
    append_u32(png, ~crc);
}

// Write a grey PNG of 8 bits, not compressed.
void write_png(const std::string& path, int64_t width, int64_t height, const int32_t* values) {
    std::string rows;
    for (int64_t y = 0; y < height; ++y) {
        rows += '\0';  // not filtered
        rows.append(values + y * width, values + (y + 1) * width);
    }
    std::string data = "IDAT\x78\x01";  // zlib
    for (size_t start = 0; start < rows.size(); start += 65535) {
        const size_t size = std::min<size_t>(65535, rows.size() - start);
        for (const size_t byte : {size_t(start + size == rows.size()), size, size >> 8, ~size, ~size >> 8})
            data += static_cast<char>(byte);  // whether it is the last stored block, its length and the complement
        data.append(rows, start, size);
    }
    uint32_t a = 1, b = 0;  // Adler-32
    for (const unsigned char byte : rows) {
        a = (a + byte) % 65521;
        b = (b + a) % 65521;
    }
    append_u32(data, b << 16 | a);

    std::string header = "IHDR", png = "\x89PNG\r\n\x1a\n";
    append_u32(header, width);
    append_u32(header, height);
    header.append("\x08\0\0\0\0", 5);  // bits, grey, and the only compression, filters and order
    append_chunk(png, header);
    append_chunk(png, data);
    append_chunk(png, "IEND");
    if (!std::ofstream(path, std::ios::binary).write(png.data(), png.size()).flush())
        throw std::runtime_error("cannot write " + path + ": choose another output or make room");
}

// The names in "dataset_info": {"classes": [{"name": "road", ...}, ...]}, in UTF-8.
std::vector<std::string> class_names(const std::string& json) {
    const std::string key = "\"name\": \"";
    std::vector<std::string> names;
    const size_t end = json.find("\"task\": {");
    for (size_t at = json.find("\"classes\": ["); (at = json.find(key, at)) < end;) {
        std::string name;
        for (at += key.size(); json.at(at) != '"'; ++at) {
            if (json[at] != '\\' || json.at(++at) != 'u') {
                name += json[at];
                continue;
            }
            uint32_t code = std::stoul(json.substr(at + 1, 4), nullptr, 16);
            at += 4;
            if (code >= 0xd800 && code < 0xdc00) {  // the first half of a character that takes two \uXXXX
                code = 0x10000 + ((code - 0xd800) << 10) + std::stoul(json.substr(at + 3, 4), nullptr, 16) - 0xdc00;
                at += 6;
            }
            const int more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;  // bytes after the first
            name += static_cast<char>(more == 0 ? code : (0xf0 << (3 - more)) | code >> 6 * more);
            for (int i = more - 1; i >= 0; --i) name += static_cast<char>(0x80 | (code >> 6 * i & 0x3f));
        }
        names.push_back(name);
    }
    return names;
}

Ort::Session open_session(const Ort::Env& env, const std::string& path) {
    if (!std::ifstream(path)) throw std::runtime_error(path + " does not exist or may not be read");
    try {
        return {env, std::filesystem::path(path).c_str(), Ort::SessionOptions()};
    } catch (const Ort::Exception& error) {
        throw std::runtime_error(path + " cannot be opened: it is damaged, or no ONNX file (" + error.what() + ")");
    }
}

void segment(const std::string& file, const std::string& photo, const std::string& output) {
    if (!OrtGetApiBase()->GetApi(ORT_API_VERSION))
        throw std::runtime_error("the ONNX Runtime found here is older than the one that this program was built with");
    Image image = read_ppm(photo);
    const Ort::Env env(ORT_LOGGING_LEVEL_FATAL);
    Ort::Session session = open_session(env, file);
    Ort::AllocatorWithDefaultOptions allocator;
    const auto metadata = session.GetModelMetadata().LookupCustomMetadataMapAllocated("pem_lightning", allocator);
    if (!metadata) throw std::runtime_error(file + " was not written by export.py");
    if (session.GetOutputNameAllocated(0, allocator).get() != std::string("classes"))
        throw std::runtime_error(file + " gives no class map: export the checkpoint with results=semantic");
    const std::vector<int64_t> shape = {1, image.height, image.width, 3};
    const std::vector<int64_t> taken = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
    for (const int i : {1, 2})  // a size that may be any is -1
        if (taken.at(i) > 0 && taken[i] != shape[i])
            throw std::runtime_error(file + " takes images of " + std::to_string(taken[2]) + " x " +
                                     std::to_string(taken[1]) + " pixels: resize the photo, or export with size=null");
    const std::string json = metadata.get();
    const std::vector<std::string> names = class_names(json);
    if (names.size() > 256) throw std::runtime_error(file + " has more than the 256 classes that fit a grey PNG");
    const size_t resize = json.find("\"resize\": {"), end = json.find('}', resize);
    if (end < json.size())
        std::cerr << "note: resize the photo as in evaluation: " << json.substr(resize, end - resize + 1) << '\n';

    const Ort::Value input = Ort::Value::CreateTensor<uint8_t>(
        allocator.GetInfo(), image.pixels.data(), image.pixels.size(), shape.data(), shape.size());
    const char *input_name = "images", *output_name = "classes";
    const auto outputs = session.Run(Ort::RunOptions(), &input_name, &input, 1, &output_name, 1);
    const int32_t* classes = outputs[0].GetTensorData<int32_t>();

    const int64_t size = image.width * image.height;
    std::vector<int64_t> counts(names.size());
    for (int64_t i = 0; i < size; ++i) ++counts.at(classes[i]);
    write_png(output, image.width, image.height, classes);
    for (size_t i = 0; i < names.size(); ++i)
        if (counts[i]) std::printf("%3zu %6.2f %%  %s\n", i, 100.0 * counts[i] / size, names[i].c_str());
}

int main(int argc, char** argv) {
    if (argc != 4) {
        std::cerr << USAGE;
        return 2;
    }
    try {
        segment(argv[1], argv[2], argv[3]);
    } catch (const std::exception& error) {
        std::string line = error.what();
        std::replace(line.begin(), line.end(), '\n', ' ');
        std::cerr << "error: " << line << '\n';
        return 2;
    }
    return 0;
}
