//! The memory a writer takes is bounded, however big the disk. Alone in its process, to be measured.

mod common;

use std::sync::Arc;

use common::{folder, init};
use jiff::Timestamp;
use repository::{BlobId, Index, Node, Reader, Repository, Tree, Writer, WriterOptions};

/// Peak of the memory of this process in MiB.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() >> 10
}

fn writer(repository: &Repository, index: &Arc<Index>) -> Writer {
    Writer::new(repository, Arc::clone(index), WriterOptions::default()).unwrap()
}

#[test]
fn a_writer_stays_far_below_256_mib_with_a_million_chunks() {
    let scratch = tempfile::tempdir().unwrap();
    let repository = init(folder(&scratch.path().join("r")));
    let index = Arc::new(repository.index().unwrap());
    let run = writer(&repository, &index);
    // More than all queues and packs hold, incompressible, a part of it in flight at any time.
    for chunk in 0..384 {
        run.submit(0, chunk, 1 << 20, common::noise(chunk, 1 << 20).into()).unwrap();
    }
    assert_eq!(run.drain().unwrap().len(), 384);
    let chunks = peak();
    assert!(chunks < 160, "{chunks} MiB");

    // The content list of 1 TiB in chunks of 1 MiB.
    let ids = (0..1 << 20).map(|n: u32| BlobId::of(&n.to_le_bytes())).collect();
    let node = Node::file("vda.raw", 1 << 40, ids, Timestamp::UNIX_EPOCH);
    let tree = run.save_tree(&Tree::new(vec![node])).unwrap();
    run.finish().unwrap();
    let with_tree = peak();
    assert!(with_tree < 240, "{chunks}, then {with_tree} MiB");

    let reader = Reader::new(&repository, Arc::new(repository.index().unwrap()), 0);
    assert_eq!(reader.tree(&tree).unwrap().nodes[0].content().len(), 1 << 20);
    let read_back = peak();
    assert!(read_back < 256, "{chunks}, {with_tree}, then {read_back} MiB");
}
