//! The clients against QEMU itself.

mod support;

use std::{fs::File, os::fd::OwnedFd, time::Duration};

use qmp_client::{Command, Ending, Qga, QgaError, Qmp, QmpError};
use serde::Deserialize;
use serde_json::{Value, json};
use support::{Qemu, SOON, impatient, options};

fn command(name: &str) -> Command {
    Command::new(name, Value::Null)
}

#[derive(Deserialize)]
struct Status {
    running: bool,
}

async fn is_running(qmp: &Qmp) -> bool {
    qmp.run::<Status>("query-status", Value::Null).await.unwrap().running
}

#[tokio::test]
async fn greets_and_offers_out_of_band() {
    for qemu in [Qemu::machine(&[]), Qemu::storage_daemon()] {
        let Some(qemu) = qemu else { return };
        let qmp = qemu.connect().await;
        assert!(qmp.greeting().version.major >= 5, "{:?}", qmp.greeting());
        assert!(qmp.greeting().capabilities.iter().any(|c| c == "oob"));
        let version: Value = qmp.run("query-version", Value::Null).await.unwrap();
        assert_eq!(version["qemu"]["major"], qmp.greeting().version.major);
    }
}

#[tokio::test]
async fn a_pretty_printing_monitor_is_understood() {
    let more = ["-qmp-pretty", "unix:pretty.sock,server=on,wait=off"];
    let Some(qemu) = Qemu::machine(&more) else { return };
    let qmp = Qmp::connect(&qemu.socket("pretty.sock"), options()).await.unwrap();
    assert!(is_running(&qmp).await);
}

#[tokio::test]
async fn many_commands_are_in_flight() {
    let Some(qemu) = Qemu::machine(&[]) else { return };
    let qmp = qemu.connect().await;
    let mut running = tokio::task::JoinSet::new();
    for n in 0..200 {
        let qmp = qmp.clone();
        running.spawn(async move {
            if n % 2 == 0 {
                let schema = qmp.execute(command("query-qmp-schema")).await.unwrap();
                assert!(schema.as_array().unwrap().len() > 500);
            } else {
                let echoed = json!({"path": "/machine", "property": "type"});
                let kind = qmp.execute(Command::new("qom-get", echoed)).await.unwrap();
                assert!(kind.as_str().unwrap().contains("q35"));
            }
        });
    }
    assert_eq!(running.join_all().await.len(), 200);
}

#[tokio::test]
async fn refusals_have_classes() {
    let Some(qemu) = Qemu::machine(&[]) else { return };
    let qmp = qemu.connect().await;
    let refused = [
        (command("no-such-command"), "CommandNotFound"),
        (Command::new("device_del", json!({"id": "none"})), "DeviceNotFound"),
        (Command::new("blockdev-del", json!({"node-name": "none"})), "GenericError"),
        (command("query-status").out_of_band(), "GenericError"), // not allowed out of band
    ];
    for (command, class) in refused {
        let error = qmp.execute(command).await.unwrap_err();
        assert!(error.is_refused_as(class), "{error:?}");
        assert!(!error.is_gone());
    }
    let unexpected = qmp.run::<Vec<u8>>("query-status", Value::Null).await;
    assert!(matches!(unexpected, Err(QmpError::Unexpected { .. })));
}

#[tokio::test]
async fn events_arrive_in_order() {
    let Some(qemu) = Qemu::machine(&[]) else { return };
    let qmp = qemu.connect().await;
    let mut events = qmp.events();
    qmp.execute(command("stop")).await.unwrap();
    qmp.execute(command("cont")).await.unwrap();
    for name in ["STOP", "RESUME"] {
        let event = events.recv().await.unwrap();
        assert_eq!(event.name, name);
        assert!(event.timestamp.unwrap().elapsed().unwrap() < Duration::from_secs(60));
    }
}

#[tokio::test]
async fn a_list_runs_in_order_past_a_failure() {
    let Some(qemu) = Qemu::machine(&[]) else { return };
    let qmp = qemu.connect().await;
    let list = ["stop", "query-status", "no-such-command", "cont", "query-status"];
    let results = qmp.execute_all(list.into_iter().map(command).collect()).await;
    assert_eq!(results.len(), 5);
    assert_eq!(results[1].as_ref().unwrap()["status"], "paused");
    assert!(results[2].as_ref().unwrap_err().is_refused_as("CommandNotFound"));
    assert_eq!(results[4].as_ref().unwrap()["status"], "running");
    let many = (0..30).map(|n| command(if n % 2 == 0 { "stop" } else { "cont" }));
    assert!(qmp.execute_all(many.collect()).await.iter().all(Result::is_ok));
    assert!(is_running(&qmp).await);
}

#[tokio::test]
async fn descriptors_reach_qemu() {
    let Some(qemu) = Qemu::machine(&[]) else { return };
    let qmp = qemu.connect().await;
    let file = || OwnedFd::from(File::open("/dev/null").unwrap());
    // All at once, behind a slow command: each must still find its own descriptor.
    let add = |set: u64| {
        let arguments = json!({"fdset-id": set, "opaque": format!("set {set}")});
        Command::new("add-fd", arguments).fd(file())
    };
    let mut commands = vec![command("query-qmp-schema")];
    commands.extend((1..=5).map(add));
    commands.push(Command::new("getfd", json!({"fdname": "named"})).fd(file()));
    let results = qmp.execute_all(commands).await;
    let failed: Vec<_> = results.iter().filter_map(|result| result.as_ref().err()).collect();
    assert!(failed.is_empty(), "{failed:?}");
    let sets = qmp.execute(command("query-fdsets")).await.unwrap();
    let sets = sets.as_array().unwrap();
    assert_eq!(sets.len(), 5);
    assert!(sets.iter().all(|set| set["fds"].as_array().unwrap().len() == 1));
    qmp.execute(Command::new("closefd", json!({"fdname": "named"}))).await.unwrap();
    let without = qmp.execute(Command::new("add-fd", json!({"fdset-id": 9}))).await;
    assert!(without.unwrap_err().is_refused_as("GenericError"));
}

#[tokio::test]
async fn a_taken_monitor_is_told_and_free_again_afterwards() {
    let Some(qemu) = Qemu::machine(&[]) else { return };
    let first = qemu.connect().await;
    let socket = qemu.socket("qmp.sock");
    // Two find room in QEMU's queue of connections, the third does not.
    let others = tokio::join!(
        Qmp::connect(&socket, impatient()),
        Qmp::connect(&socket, impatient()),
        Qmp::connect(&socket, impatient()),
    );
    for other in [others.0, others.1, others.2] {
        assert!(matches!(other, Err(QmpError::NoGreeting { waited, .. }) if waited <= 2 * SOON));
    }
    drop(first);
    assert!(is_running(&qemu.connect().await).await);
}

#[tokio::test]
async fn a_killed_qemu_closes_everything() {
    let Some(mut qemu) = Qemu::machine(&[]) else { return };
    let qmp = qemu.connect().await;
    qemu.kill();
    assert!(matches!(qmp.closed().await, Ending::HungUp));
    let error = qmp.execute(command("query-status")).await.unwrap_err();
    assert!(error.is_gone());
    let again = Qmp::connect(&qemu.socket("qmp.sock"), options()).await;
    assert!(matches!(again, Err(QmpError::Connect { .. })));
}

#[tokio::test]
async fn a_quitting_qemu_still_answers() {
    let Some(qemu) = Qemu::machine(&[]) else { return };
    let qmp = qemu.connect().await;
    qmp.execute(command("quit")).await.unwrap();
    assert!(matches!(qmp.closed().await, Ending::HungUp));
}

#[tokio::test]
async fn an_agents_socket_is_no_monitor_and_a_monitor_no_agent() {
    let agent = "socket,id=agent,path=qga.sock,server=on,wait=off";
    let port = "virtserialport,chardev=agent,name=org.qemu.guest_agent.0";
    let more = ["-chardev", agent, "-device", "virtio-serial", "-device", port];
    let Some(qemu) = Qemu::machine(&more) else { return };
    let result = Qmp::connect(&qemu.socket("qga.sock"), impatient()).await;
    assert!(matches!(result, Err(QmpError::NotQmp { .. })), "{result:?}");
    let result = Qga::connect(&qemu.socket("qga.sock"), impatient()).await;
    assert!(matches!(result, Err(QgaError::NotAnswering { .. })), "{result:?}");
    let result = Qga::connect(&qemu.socket("qmp.sock"), options()).await;
    assert!(matches!(result, Err(QgaError::NotQga { .. })), "{result:?}");
}
