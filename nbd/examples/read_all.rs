//! Reads a whole export and reports the rate: `read_all SOCKET [EXPORT [DEPTH [CONNECTIONS]]]`.
//!
//! To compare with `nbdcopy --no-extents URI null:`, which reads everything as well.

use std::{env, error::Error, path::PathBuf, time::Instant};

use nbd::{Client, Options};
use tokio::task::JoinSet;

const READ_LEN: u32 = 1 << 20;

#[tokio::main]
#[expect(clippy::print_stdout, reason = "the result of the example")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args = env::args().skip(1);
    let socket = PathBuf::from(args.next().ok_or("usage: read_all SOCKET [EXPORT [DEPTH [N]]]")?);
    let export = args.next().unwrap_or_default();
    let depth: u64 = args.next().map_or(Ok(16), |depth| depth.parse())?;
    let connections = args.next().map_or(Ok(1), |count| count.parse())?;
    let options = Options { export, connections, ..Options::default() };
    let client = Client::connect(&socket, options).await?;
    let begin = Instant::now();
    let mut readers = JoinSet::new();
    for reader in 0..depth {
        let client = client.clone();
        readers.spawn(async move {
            let step = u64::from(READ_LEN);
            let mut offset = reader * step;
            while offset < client.size() {
                let len = u32::try_from(step.min(client.size() - offset)).unwrap_or(READ_LEN);
                client.read(offset, len).await?;
                offset += depth * step;
            }
            Ok::<_, nbd::NbdError>(())
        });
    }
    while let Some(reader) = readers.join_next().await {
        reader??;
    }
    let seconds = begin.elapsed().as_secs_f64();
    client.disconnect().await?;
    let mib = client.size() / (1 << 20);
    println!("{mib} MiB in {seconds:.3} s, depth {depth}, {connections} connection(s)");
    Ok(())
}
