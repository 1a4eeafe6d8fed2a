//! The parser of qcow2 headers, and that of the records of image folders, against arbitrary bytes.
#![no_main]

use image_tools::inspect::qcow2;
use image_tools::record::ImageRecord;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u64, &[u8])| {
    let (file_len, bytes) = input;
    if let Ok(header) = qcow2::parse(bytes, file_len) {
        assert!(header.size <= qcow2::SIZE_MAX);
    }
    let _ = qcow2::parse(&[b"QFI\xfb\0\0\0\x03", bytes].concat(), file_len);
    let _ = ImageRecord::parse(bytes);
});
