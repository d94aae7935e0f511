"""Two tiny models in transformers' Trainer, as they are and balanced: MaxVio while they train."""

from importlib.resources import files

import transformers as hf

from equipoise.balance import BalanceCallback, Bias, Loss, Sign, attach

data = files("equipoise") / "data"
ids = "".join(page.read_text() for page in sorted((data / "questions/test").iterdir()))
ids = hf.AutoTokenizer.from_pretrained(data / "demo")(ids, verbose=False)["input_ids"]
rows = [{"input_ids": ids[i : i + 64], "labels": ids[i : i + 64]} for i in range(0, 30000, 64)]
args = hf.TrainingArguments(max_steps=60, learning_rate=1e-3, logging_steps=20, save_strategy="no")
size = {"vocab_size": 4096, "hidden_size": 32, "intermediate_size": 64, "num_experts_per_tok": 2}
size |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
size |= {"moe_intermediate_size": 64, "n_routed_experts": 16, "first_k_dense_replace": 0}
for config in hf.MixtralConfig(**size), hf.DeepseekV3Config(**size):
    for terms in (), (Loss("switch", weight=3e-2), Bias(Sign(rate=1e-3))):
        hf.set_seed(0)
        handle = attach(hf.AutoModelForCausalLM.from_config(config), *terms)
        trainer = hf.Trainer(handle.model, args, None, rows, callbacks=[BalanceCallback(handle)])
        trainer.remove_callback(hf.trainer.ProgressCallback)
        trainer.train()
        seen = [f"{log['balance/max_vio']:.1f}" for log in trainer.state.log_history[:3]]
        print(*seen, f"(chance {handle.metrics()['balance/max_vio_floor']:.1f})", handle)
