//! Says what a disk would boot: `bootdisk DISK [COMMAND LINE]`. Nothing is written.

use drover_hv::bootdisk::{DiskFile, Limits, find};
use drover_hv::loader::{DISK_INITRD_BYTES_MAX, KERNEL_FILE_BYTES_MAX};

fn main() -> std::process::ExitCode {
    match run() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let Some(disk) = arguments.next() else {
        return Err("usage: bootdisk DISK [COMMAND LINE]".into());
    };
    let command_line: Vec<String> = arguments.collect();
    let limits =
        Limits { kernel_bytes_max: KERNEL_FILE_BYTES_MAX, initrd_bytes_max: DISK_INITRD_BYTES_MAX };
    let disk = DiskFile::open(disk.as_ref())?;
    let boot = find(Box::new(disk), limits, &command_line.join(" "), None)?;
    println!("{}", boot.description);
    println!("kernel: {} bytes", boot.kernel.len());
    match &boot.initrd {
        Some(initrd) => println!("initrd: {} bytes", initrd.len()),
        None => println!("no initrd"),
    }
    println!("command line: {}", boot.command_line);
    Ok(())
}
