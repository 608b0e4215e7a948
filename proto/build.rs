//! Generates the Rust of every service below `drover/`.
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let protos = [
        "drover/v1/cluster.proto",
        "drover/v1/domain.proto",
        "drover/v1/event.proto",
        "drover/v1/network.proto",
        "drover/v1/node.proto",
        "drover/v1/operation.proto",
        "drover/v1/storage.proto",
        "drover/agent/v1/agent.proto",
        "drover/raft/v1/disk.proto",
        "drover/raft/v1/raft.proto",
        "drover/store/v1/store.proto",
        "drover/vmm/v1/vmm.proto",
    ];
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    tonic_prost_build::configure()
        .bytes(".")
        .btree_map(".")
        .file_descriptor_set_path(out.join("drover.fds"))
        .compile_protos(&protos, &["."])?;
    println!("cargo:rerun-if-changed=drover");
    Ok(())
}
