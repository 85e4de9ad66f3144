//! A model divided over ranks answers as it does on one, and a reload changes the number.

use serde_json::{Value, json};

use crate::harness::{Daemon, Setup, field};

#[actix::test]
async fn a_model_on_two_ranks_gives_the_answers_that_it_gives_on_one() {
    const BASE: &str = "@cf/huggingfacetb/smollm2-135m-instruct";
    let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/tiny-llama");
    // On two ranks it has a draft model, too, which stays on one.
    let config = |ranks: usize| {
        let draft = if ranks == 2 { format!("draft = {model:?}\n") } else { String::new() };
        format!(
            "[engine]\nprompt_lookup = false\n[[model]]\nid = {BASE:?}\npath = {model:?}\nkv_bytes = \"4MiB\"\nprecision = \"plain\"\ntensor_parallel = {ranks}\n{draft}"
        )
    };
    let mut daemon = Daemon::start(Setup { config: &config(1), env: &[] });
    let base = daemon.base.clone();
    let ask = async || {
        let asked = ["The pilot", "A river that", "Seven"].map(async |prompt| {
            let body = json!({"model": BASE, "prompt": prompt, "max_tokens": 48, "temperature": 0, "ignore_eos": true});
            let answer =
                reqwest::Client::new().post(format!("{base}/v1/completions")).json(&body).send().await.unwrap();
            assert_eq!(answer.status(), 200);
            answer.json::<Value>().await.unwrap()["choices"][0]["text"].as_str().unwrap().to_owned()
        });
        futures_util::future::join_all(asked).await
    };
    let expected = ask().await;
    assert!(expected.iter().all(|text| text.len() > 48), "{expected:?}");
    let mut drafted = 0.0;
    for (done, ranks) in [2, 4, 1].into_iter().enumerate() {
        daemon.rewrite_config(&config(ranks));
        daemon.signal(libc::SIGHUP);
        daemon.wait_logs("reload done", done + 1);
        let loaded = daemon.logged("model loaded");
        assert_eq!((loaded.len(), field(&loaded[done + 1], "ranks")), (done + 2, json!(ranks)));
        assert_eq!(ask().await, expected, "on {ranks} ranks");
        if ranks == 2 {
            drafted =
                daemon.metric(&format!(r#"neurond_spec_drafted_tokens_total{{device="0",model="{BASE}"}}"#)).await;
        }
    }
    assert!(drafted > 0.0, "the draft model was never asked");
    // What this model cannot be divided by leaves what is there.
    daemon.rewrite_config(&config(3));
    daemon.signal(libc::SIGHUP);
    let failed = daemon.wait_log("reload: model not loaded, what was there stays");
    let error = field(&failed, "error");
    assert!(error.as_str().unwrap().contains("tensor_parallel = 3 is not possible for this model"), "{failed}");
    assert_eq!(ask().await, expected);
}
