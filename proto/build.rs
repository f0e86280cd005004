//! Compiles the `.proto` files with protox, so that no protoc is needed on the machine.

use prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "holdfast/v1/cache.proto",
        "holdfast/v1/cluster.proto",
        "holdfast/peer/v1/record.proto",
        "holdfast/peer/v1/peer.proto",
    ];
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["."])?;

    // Reflection serves the descriptors as they were compiled.
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;

    tonic_prost_build::configure()
        // Values and keys are slices of the buffer they arrived in, not copies.
        .bytes(".")
        // Most entries in memory have none.
        .boxed(".holdfast.peer.v1.EntryRecord.validators")
        .compile_fds(descriptors)?;
    Ok(())
}
