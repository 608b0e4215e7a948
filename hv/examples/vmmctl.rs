//! Speaks to one VMM by hand, without an agent: `vmmctl SOCKET COMMAND …`.
//!
//! For work on the hypervisor itself. `vmmctl SOCKET` alone lists the commands.

use std::io::Write;
use std::time::Duration;

use drover_proto::v1::{ConsoleInput, MigrationLimits};
use drover_proto::vmm::v1::vmm_service_client::VmmServiceClient;
use drover_proto::vmm::v1::{
    AttachDiskRequest, CancelMigrationRequest, DetachDiskRequest, Disk, DiskLimits,
    GetStatusRequest, GrowDiskRequest, GuestAgentCallRequest, PauseRequest, PowerButtonRequest,
    PrepareIncomingRequest, QuitRequest, ResetRequest, ResumeRequest, SaveRequest,
    SetDiskLimitsRequest, SetGenerationRequest, StartMigrationRequest, TakeOverRequest, VmmStatus,
    disk,
};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio_stream::StreamExt;
use tonic::transport::{Channel, Endpoint, Uri};

const COMMANDS: &str = "commands:
  status | watch | pause | resume | power-button | reset | quit
  save PATH                   write the guest to a file or block device, and end
  limit INDEX IOPS IOPS_BURST BYTES_PER_SECOND BYTES_BURST
  grow INDEX                  the disk's volume is larger now
  attach PATH SERIAL SLOT | detach SERIAL
  agent COMMAND               a command of the guest agent protocol, JSON
  generation UUID             the guest has become another one
  console SECONDS             show history and what comes
  type TEXT                   type a line
  prepare ID TOKEN ADDR EPOCH
  migrate ID TOKEN ADDR EPOCH [DOWNTIME_MS]
  cancel ID | take-over EPOCH";

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let Some((socket, command)) = args.split_first() else {
        return Err(format!("usage: vmmctl SOCKET COMMAND …\n{COMMANDS}").into());
    };
    let mut vmm = connect(socket).await?;
    let shown = match *command {
        ["status"] => vmm.get_status(GetStatusRequest {}).await?.into_inner(),
        ["pause"] => vmm.pause(PauseRequest {}).await?.into_inner(),
        ["resume"] => vmm.resume(ResumeRequest {}).await?.into_inner(),
        ["save", path] => vmm.save(SaveRequest { path: path.into() }).await?.into_inner(),
        ["power-button"] => vmm.power_button(PowerButtonRequest {}).await?.into_inner(),
        ["reset"] => vmm.reset(ResetRequest {}).await?.into_inner(),
        ["quit"] => {
            vmm.quit(QuitRequest {}).await?;
            return Ok(());
        }
        ["watch"] => return watch(vmm).await,
        ["console", seconds] => {
            return console(vmm, Vec::new(), Duration::from_secs_f64(seconds.parse()?)).await;
        }
        ["type", text] => {
            return console(vmm, format!("{text}\n").into_bytes(), Duration::from_secs(1)).await;
        }
        ["prepare", id, token, address, epoch] => {
            let request = PrepareIncomingRequest {
                migration_id: id.into(),
                token: token.into(),
                listen_address: address.into(),
                epoch: epoch.parse()?,
            };
            let answer = vmm.prepare_incoming(request).await?.into_inner();
            println!("{}", answer.listen_address);
            return Ok(());
        }
        ["migrate", id, token, address, epoch, ref rest @ ..] => {
            let downtime = match rest {
                [ms] => Some(Duration::from_millis(ms.parse()?).try_into()?),
                _ => None,
            };
            let request = StartMigrationRequest {
                migration_id: id.into(),
                address: address.into(),
                token: token.into(),
                to_epoch: epoch.parse()?,
                limits: Some(MigrationLimits { downtime, ..Default::default() }),
            };
            vmm.start_migration(request).await?.into_inner()
        }
        ["limit", index, iops, iops_burst, bytes_per_second, bytes_burst] => {
            let limits = DiskLimits {
                iops: iops.parse()?,
                iops_burst: iops_burst.parse()?,
                bytes_per_second: bytes_per_second.parse()?,
                bytes_burst: bytes_burst.parse()?,
            };
            let disk = Some(disk(index)?);
            let request = SetDiskLimitsRequest { disk, limits: Some(limits) };
            vmm.set_disk_limits(request).await?.into_inner()
        }
        ["grow", index] => {
            let request = GrowDiskRequest { disk: Some(disk(index)?) };
            println!("{:?}", vmm.grow_disk(request).await?.into_inner());
            return Ok(());
        }
        ["attach", path, serial, slot] => {
            let request = AttachDiskRequest {
                path: path.into(),
                serial: serial.into(),
                slot: slot.parse()?,
                ..Default::default()
            };
            vmm.attach_disk(request).await?.into_inner()
        }
        ["detach", serial] => {
            let request = DetachDiskRequest { serial: serial.into(), timeout: None };
            vmm.detach_disk(request).await?.into_inner()
        }
        ["generation", id] => {
            let request = SetGenerationRequest { generation_id: id.into() };
            vmm.set_generation(request).await?.into_inner()
        }
        ["agent", command] => {
            let request = GuestAgentCallRequest { command: command.into(), timeout: None };
            println!("{}", vmm.guest_agent_call(request).await?.into_inner().result);
            return Ok(());
        }
        ["cancel", id] => {
            let request = CancelMigrationRequest { migration_id: id.into() };
            vmm.cancel_migration(request).await?.into_inner()
        }
        ["take-over", epoch] => {
            vmm.take_over(TakeOverRequest { epoch: epoch.parse()? }).await?.into_inner()
        }
        _ => return Err(COMMANDS.into()),
    };
    show(&shown);
    Ok(())
}

fn disk(index: &str) -> Result<Disk, std::num::ParseIntError> {
    Ok(Disk { which: Some(disk::Which::Index(index.parse()?)) })
}

async fn connect(socket: &str) -> Result<VmmServiceClient<Channel>, tonic::transport::Error> {
    let socket = socket.to_owned();
    // The address is not used: the connector has the socket's path.
    let channel = Endpoint::from_static("http://vmm")
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
        }))
        .await?;
    Ok(VmmServiceClient::new(channel))
}

fn show(status: &VmmStatus) {
    println!(
        "{} {} epoch {} reboots {} up {} ms rx {} tx {}",
        status.state().as_str_name(),
        status.state_reason,
        status.epoch,
        status.reboot_count,
        status.uptime_ms,
        status.net_rx_bytes,
        status.net_tx_bytes
    );
    for disk in &status.disks {
        println!("  {disk:?}");
    }
    if let Some(migration) = &status.migration {
        println!("  {migration:?}");
    }
}

async fn watch(mut vmm: VmmServiceClient<Channel>) -> Result<(), Box<dyn std::error::Error>> {
    let mut statuses = vmm.watch_status(GetStatusRequest {}).await?.into_inner();
    while let Some(status) = statuses.next().await {
        show(&status?);
    }
    Ok(())
}

async fn console(
    mut vmm: VmmServiceClient<Channel>,
    typed: Vec<u8>,
    time: Duration,
) -> Result<(), Box<dyn std::error::Error>> {
    let first = ConsoleInput { data: typed.into(), ..Default::default() };
    let input = tokio_stream::once(first).chain(tokio_stream::pending());
    let mut output = vmm.attach_console(input).await?.into_inner();
    let end = tokio::time::Instant::now() + time;
    while let Ok(Some(said)) = tokio::time::timeout_at(end, output.next()).await {
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(&said?.data)?;
        stdout.flush()?;
    }
    Ok(())
}
