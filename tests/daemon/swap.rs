//! HUP: the configuration is read again, models are swapped under running streams, a bad file changes nothing.

use std::time::Duration;

use futures_util::future::join_all;
use serde_json::json;

use crate::harness::{Daemon, MODEL, Setup, field, sim};
use crate::signals::{read, stream};

#[actix::test]
async fn a_swap_drops_no_stream_and_frees_the_old_version() {
    let mut daemon = Daemon::start(Setup { config: &sim(5, ""), env: &[] });
    let open: Vec<_> = join_all((0..8).map(|_| stream(&daemon.base, 200))).await;
    daemon.rewrite_config(&sim(4, ""));
    daemon.signal(libc::SIGHUP);
    daemon.wait_log("reload done");
    // The new version answers while the old one is still at work for those who came before.
    assert_eq!(read(stream(&daemon.base, 20).await).await, (21, true));
    for (chunks, ended_well) in join_all(open.into_iter().map(read)).await {
        assert_eq!((chunks, ended_well), (201, true));
    }
    daemon.wait_log("old version freed");
    assert_eq!(daemon.metric(r#"neurond_swaps_total{outcome="done"}"#).await, 1.0);
    assert_eq!(daemon.metric(r#"neurond_config_reloads_total{outcome="applied"}"#).await, 1.0);
}

#[actix::test]
async fn calls_that_race_with_swaps_are_all_answered() {
    let mut daemon = Daemon::start(Setup { config: &sim(1, ""), env: &[] });
    let base = daemon.base.clone();
    let calls = tokio::spawn(async move {
        let mut answered = 0;
        for _ in 0..60 {
            for (_, ended_well) in join_all((0..4).map(|_| async { read(stream(&base, 5).await).await })).await {
                assert!(ended_well);
                answered += 1;
            }
        }
        answered
    });
    for round in 0..4 {
        daemon.rewrite_config(&sim(1 + round % 2, ""));
        daemon.signal(libc::SIGHUP);
        daemon.wait_logs("reload done", round as usize + 1);
    }
    assert_eq!(calls.await.unwrap(), 240);
}

#[actix::test]
async fn a_bad_configuration_is_refused_and_the_old_one_stays() {
    let mut daemon = Daemon::start(Setup { config: &sim(0, ""), env: &[] });
    daemon.rewrite_config(&format!("{}\n[engine]\nstep_tokens = 0\n", sim(0, "")));
    daemon.signal(libc::SIGHUP);
    let refused = daemon.wait_log("reload refused; the configuration in force stays");
    assert!(field(&refused, "error").as_str().unwrap().contains("step_tokens"), "{refused}");
    assert!(read(stream(&daemon.base, 3).await).await.1);
    assert_eq!(daemon.metric(r#"neurond_config_reloads_total{outcome="refused"}"#).await, 1.0);
}

#[actix::test]
async fn a_model_that_cannot_be_loaded_leaves_the_old_one_serving() {
    let mut daemon = Daemon::start(Setup { config: &sim(0, ""), env: &[] });
    std::fs::write(daemon.dir.path().join("broken.gguf"), "GGUF, but not really").unwrap();
    daemon.rewrite_config(&sim(0, "").replace("sim:end_in=0,step_us=0", "broken.gguf"));
    daemon.signal(libc::SIGHUP);
    let failed = daemon.wait_log("reload: model not loaded, what was there stays");
    assert!(field(&failed, "error").as_str().unwrap().contains("broken.gguf"), "{failed}");
    assert!(read(stream(&daemon.base, 3).await).await.1);
    assert_eq!(daemon.metric(r#"neurond_swaps_total{outcome="failed"}"#).await, 1.0);
}

#[actix::test]
async fn a_model_file_that_vanished_refuses_the_reload_by_name() {
    let mut daemon = Daemon::start(Setup { config: &sim(0, ""), env: &[] });
    daemon.rewrite_config(&sim(0, "").replace("sim:end_in=0,step_us=0", "/nonexistent/model.gguf"));
    daemon.signal(libc::SIGHUP);
    let refused = daemon.wait_log("reload refused; the configuration in force stays");
    assert!(field(&refused, "error").as_str().unwrap().contains("/nonexistent/model.gguf"), "{refused}");
    assert!(read(stream(&daemon.base, 3).await).await.1);
}

#[actix::test]
async fn a_dead_engine_thread_fails_its_streams_cleanly_and_is_started_again() {
    let mut daemon = Daemon::start(Setup { config: &sim(2, ",fail_at=40"), env: &[] });
    let (chunks, ended_well) = read(stream(&daemon.base, 500).await).await;
    assert!(!ended_well && chunks > 1, "{chunks} chunks, ended well: {ended_well}");
    daemon.wait_log("engine thread died");
    let body = json!({"model": MODEL, "prompt": "again", "max_tokens": 3});
    for attempt in 0.. {
        let call = reqwest::Client::new().post(format!("{}/v1/completions", daemon.base)).json(&body).send();
        if call.await.unwrap().status() == 200 {
            break;
        }
        assert!(attempt < 100, "never served again");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(daemon.metric(r#"neurond_engine_restarts_total{device="0"}"#).await, 1.0);
}

#[actix::test]
async fn an_adapter_goes_on_answering_on_the_version_that_replaces_its_base() {
    const BASE: &str = "@cf/huggingfacetb/smollm2-135m-instruct";
    let goldens = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
    let adapters = tempfile::tempdir().unwrap();
    let mine = adapters.path().join("test/0e8c6b5e-6f0d-4b7e-9a53-0d7c1f2a3b4c");
    std::fs::create_dir_all(&mine).unwrap();
    let about = json!({"name": "mine", "model": BASE, "description": "", "created": 0});
    std::fs::write(mine.join("finetune.json"), about.to_string()).unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(goldens.join("tiny-llama-lora/wide").join(name), mine.join(name)).unwrap();
    }
    let config = |context: u32| {
        let (model, adapters) = (goldens.join("tiny-llama"), adapters.path());
        format!(
            "[lora]\npath = {adapters:?}\n[[model]]\nid = {BASE:?}\npath = {model:?}\nkv_bytes = \"4MiB\"\ncontext = {context}\n"
        )
    };
    let daemon = Daemon::start(Setup { config: &config(512), env: &[] });
    let base = daemon.base.clone();
    let ask = async |tokens: u32| {
        let body = json!({"model": BASE, "prompt": "The pilot", "max_tokens": tokens, "temperature": 0, "lora": "mine", "ignore_eos": true});
        let answer = reqwest::Client::new().post(format!("{base}/v1/completions")).json(&body).send().await.unwrap();
        assert_eq!(answer.status(), 200);
        let answer: serde_json::Value = answer.json().await.unwrap();
        answer["choices"][0]["text"].as_str().unwrap().to_owned()
    };
    let before = ask(24).await;
    let (across, ()) = futures_util::future::join(ask(300), async {
        daemon.rewrite_config(&config(400));
        daemon.signal(libc::SIGHUP);
        while daemon.logged("reload done").is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert!(across.starts_with(&before));
    assert_eq!(ask(24).await, before);
    assert_eq!(daemon.metric(r#"neurond_swaps_total{outcome="done"}"#).await, 1.0);
    assert_eq!(
        daemon.metric(r#"neurond_adapter_loads_total{outcome="done"}"#).await,
        1.0,
        "packed once for both versions"
    );
}
