"""The metrics against identities, hand-made numbers, other implementations and bad input."""

from __future__ import annotations

import math
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.errors import MetricUndefined
from quantlab.metrics import METRICS, kl
from quantlab.metrics.classes import class_accuracy, judge_agreement
from quantlab.metrics.frechet import frechet_distance
from quantlab.metrics.kl import QUANTILES, kld_quantiles, token_statistics
from quantlab.metrics.latent import latent_cosine, latent_rel_mse
from quantlab.metrics.output_error import output_cosine, output_rel_error
from quantlab.metrics.perplexity import ln_ppl_ratio, perplexity
from quantlab.metrics.psnr import image_mse, num_identical, psnr_db, psnr_pooled_db, to_uint8
from quantlab.metrics.ssim import ssim
from quantlab.metrics.trajectory import step_divergence, step_sqnr_db, weighted_velocity_mse
from quantlab.protocols.table import PROTOCOLS

PHOTOS = ("astronaut", "coffee", "chelsea")
SELF_VALUES = [
    (latent_rel_mse, 0.0),
    (latent_cosine, 1.0),
    (output_cosine, 1.0),
    (output_rel_error, 0.0),
]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def damaged(photo: np.ndarray, damage: str) -> np.ndarray:
    if damage == "noise":
        shift = np.random.default_rng(0).normal(0, 8, photo.shape)
    elif damage == "darker":
        shift = -0.1 * photo
    else:
        shift = np.roll(photo, 2, axis=1).astype(float) - photo
    return np.clip(photo + shift, 0, 255).round().astype(np.uint8)


class TestTable:
    def test_rows_are_named_by_their_key_and_belong_to_a_protocol(self):
        assert all(name == metric.name for name, metric in METRICS.items())
        assert all(metric.protocols and set(metric.protocols) <= set(PROTOCOLS) for metric in METRICS.values())
        assert set(QUANTILES) <= set(METRICS)

    def test_the_table_needs_neither_torch_nor_numpy(self):
        code = "import sys, quantlab.metrics; print(sorted({'torch', 'numpy', 'scipy'} & set(sys.modules)))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


class TestPerSampleErrors:
    @pytest.mark.parametrize(("metric", "value"), SELF_VALUES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_tensor_with_itself(self, metric, value, dtype):
        x = noise(3, 4, 5, dtype=dtype)
        found = metric(x, x)
        assert found.shape == (3,)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, value, atol=1e-12)

    def test_known_values(self):
        reference = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
        candidate = torch.tensor([[3.0, 1.0], [0.0, 1.0]])
        np.testing.assert_allclose(latent_rel_mse(candidate, reference), [9 / 25, 2.0])
        np.testing.assert_allclose(output_rel_error(candidate, reference), [3 / 5, math.sqrt(2)])
        np.testing.assert_allclose(latent_cosine(candidate, reference), [13 / (5 * math.sqrt(10)), 0.0])

    def test_samples_do_not_see_each_other(self):
        x, y = noise(4, 6), noise(4, 6, seed=1)
        np.testing.assert_array_equal(latent_rel_mse(x, y)[2:], latent_rel_mse(x[2:], y[2:]))

    def test_sums_are_in_float64(self):
        reference = torch.full((1, 2_000_000), 0.1)
        found = latent_rel_mse(reference * 1.5, reference)[0]
        exact = (np.float32(0.1) * np.float32(1.5) - np.float32(0.1)).astype(float) ** 2 / float(np.float32(0.1)) ** 2
        assert found == pytest.approx(exact, rel=1e-9)

    @pytest.mark.parametrize("metric", [metric for metric, _ in SELF_VALUES])
    def test_refusals(self, metric):
        with pytest.raises(MetricUndefined, match=rf"^{metric.__name__}: .*\(2, 3\).*\(2, 4\).*same inputs$"):
            metric(noise(2, 3), noise(2, 4))
        with pytest.raises(MetricUndefined, match=rf"^{metric.__name__}: sample 1 is all zeros"):
            metric(noise(2, 3), noise(2, 3) * torch.tensor([[1.0], [0.0]]))


class TestImages:
    def test_an_image_with_itself(self):
        from skimage import data

        photo = data.chelsea()[None]
        assert psnr_db(photo, photo) == [100.0]
        assert ssim(photo, photo) == pytest.approx([1.0])
        assert num_identical(photo, photo) == 1

    @pytest.mark.parametrize("damage", ["noise", "darker", "shift"])
    @pytest.mark.parametrize("name", PHOTOS)
    def test_agrees_with_scikit_image(self, name, damage):
        from skimage import data
        from skimage.metrics import peak_signal_noise_ratio, structural_similarity

        photo = getattr(data, name)()[:200, :240]
        other = damaged(photo, damage)
        oracle = structural_similarity(
            photo,
            other,
            win_size=11,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            channel_axis=2,
            data_range=255,
        )
        assert ssim(other[None], photo[None])[0] == pytest.approx(oracle, abs=1e-7)
        assert psnr_db(other[None], photo[None])[0] == pytest.approx(peak_signal_noise_ratio(photo, other), abs=1e-9)

    def test_smallest_image_of_one_window_and_one_channel(self):
        x = to_uint8(torch.rand(2, 11, 11, 1, generator=torch.Generator().manual_seed(0)))
        assert ssim(x, x) == pytest.approx([1.0, 1.0])
        assert ssim(x, x[::-1])[0] < 0.9

    def test_identical_images_are_counted(self):
        images = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
        other = images.copy()
        other[1, 0, 0, 0] += 1
        assert num_identical(torch.from_numpy(other), images) == 2
        np.testing.assert_allclose(psnr_db(other, images), [100.0, 10 * math.log10(255**2 * 48), 100.0])

    def test_rounding_to_8_bit(self):
        images = torch.tensor([[0.0, 1.0, 0.5, 1.7, -0.2, 0.0019, 0.0021]], dtype=torch.float32)
        assert to_uint8(images).tolist() == [[0, 255, 128, 255, 0, 0, 1]]
        assert to_uint8(images.bfloat16()).dtype == np.uint8
        assert to_uint8(images.numpy()).tolist() == to_uint8(images).tolist()

    def test_images_are_those_that_people_save(self, tmp_path):
        """The number of a script on PNG files: rounded to 8 bits, 6 dB from that of the unrounded images here."""
        from PIL import Image

        generator = np.random.default_rng(0)
        images = generator.random((5, 24, 24, 3)).astype(np.float32)
        others = np.clip(images + 4e-4 * generator.standard_normal(images.shape), 0, 1).astype(np.float32)
        squares = []
        for pair in zip(others, images, strict=True):
            saved = []
            for side, image in enumerate(pair):  # as a pipeline of Diffusers gives them to PIL
                Image.fromarray((image * 255).round().astype("uint8")).save(tmp_path / f"{side}.png")
                saved.append(np.asarray(Image.open(tmp_path / f"{side}.png")).astype(float))
            squares.append(np.mean((saved[0] - saved[1]) ** 2))
        found = psnr_db(to_uint8(others), to_uint8(images))
        np.testing.assert_allclose(found, [10 * math.log10(255**2 / square) for square in squares])
        unrounded = -10 * np.log10(np.mean((others - images) ** 2, axis=(1, 2, 3)))
        assert (unrounded - found > 6).all()
        pooled = psnr_pooled_db(image_mse(to_uint8(others), to_uint8(images)))
        assert pooled == pytest.approx(10 * math.log10(255**2 / np.mean(squares)))

    def test_identical_images_raise_the_mean_of_db_and_not_the_pooled_number(self):
        images = np.zeros((4, 16, 16, 1), np.uint8)
        other = images.copy()
        other[0, 0, 0] = 1
        one = 10 * math.log10(255**2 * 256)
        assert psnr_db(other, images).mean() == pytest.approx((3 * 100 + one) / 4)
        assert psnr_pooled_db(image_mse(other, images)) == pytest.approx(one + 10 * math.log10(4))
        assert psnr_pooled_db(image_mse(images, images)) == 100.0
        with pytest.raises(MetricUndefined, match=r"^psnr_pooled_db: sample 1 is nan"):
            psnr_pooled_db([0.1, math.nan])

    def test_refusals(self):
        x = np.zeros((1, 10, 30, 3), np.uint8)
        with pytest.raises(MetricUndefined, match=r"^ssim: images of 10 x 30 px .* 11 px.*or more$"):
            ssim(x, x)
        for metric, name in ((psnr_db, "psnr_db"), (ssim, "ssim"), (num_identical, "n_identical")):
            with pytest.raises(MetricUndefined, match=rf"^{name}: the images are float32.*to_uint8$"):
                metric(x, x.astype(np.float32))
            with pytest.raises(MetricUndefined, match=rf"^{name}: .*\(n, height, width, channels\)$"):
                metric(x, x[:, :9])
        with pytest.raises(MetricUndefined, match=r"^images: sample 1 is nan"):
            to_uint8(torch.tensor([[0.5], [math.nan]]))
        with pytest.raises(MetricUndefined, match=r"^images: to_uint8 takes floats"):
            to_uint8(x)


class TestTrajectory:
    def test_equal_trajectories(self):
        x = noise(3, 2, 4)
        curve, table = step_sqnr_db(x, x)
        np.testing.assert_array_equal(curve, [100.0] * 3)
        np.testing.assert_array_equal(table, np.full((3, 2), 100.0))
        np.testing.assert_array_equal(step_divergence(x, x)[1], np.zeros((3, 2)))
        np.testing.assert_array_equal(weighted_velocity_mse(x, x, [1, 0.5, 0.2, 0]), np.zeros(2))

    def test_known_values(self):
        reference = noise(2, 3, 50)
        candidate = reference * torch.tensor([1.1, 1.01])[:, None, None]
        np.testing.assert_allclose(step_sqnr_db(candidate, reference)[0], [20.0, 40.0], atol=1e-3)
        np.testing.assert_allclose(step_divergence(candidate, reference)[1], [[0.1] * 3, [0.01] * 3], rtol=1e-4)
        shifted = reference + torch.tensor([2.0, 3.0])[:, None, None]
        expected = 0.6**2 * 4 + 0.4**2 * 9
        found = weighted_velocity_mse(shifted, reference, [1.0, 0.4, 0.0])
        np.testing.assert_allclose(found, [expected] * 3, rtol=1e-5)

    def test_first_order_error_of_an_euler_sampler(self):
        """One step wrong: the weighted velocity error is exactly the final latent's mean squared error."""
        sigmas = torch.tensor([1.0, 0.7, 0.3, 0.0])
        reference, wrong = noise(3, 2, 8), noise(3, 2, 8)
        wrong[1] += 0.1 * noise(2, 8, seed=5)
        final = [(sigmas.diff()[:, None, None] * v).sum(0) for v in (wrong, reference)]
        mse = ((final[0] - final[1]) ** 2).mean(-1).numpy()
        np.testing.assert_allclose(weighted_velocity_mse(wrong, reference, sigmas), mse, rtol=1e-5)

    def test_sequences_of_steps(self):
        x, y = noise(3, 2, 4), noise(3, 2, 4, seed=1)
        np.testing.assert_array_equal(step_divergence(list(x), list(y))[1], step_divergence(x, y)[1])

    def test_refusals(self):
        x = noise(3, 2, 4)
        broken = x.clone()
        broken[2, 1, 0] = math.nan
        for metric in (step_sqnr_db, step_divergence):
            with pytest.raises(MetricUndefined, match=rf"^{metric.__name__}/2: sample 1 is nan"):
                metric(broken, x)
            with pytest.raises(MetricUndefined, match=rf"^{metric.__name__}: .*2 steps.*3.*num_inference_steps$"):
                metric(x[:2], x)
            with pytest.raises(MetricUndefined, match=rf"^{metric.__name__}/0: sample 0 is all zeros"):
                metric(x, x * 0)
        with pytest.raises(MetricUndefined, match=r"^weighted_velocity_mse: 3 steps lie between 4 sigmas"):
            weighted_velocity_mse(x, x, [1, 0.5, 0])


class TestClasses:
    def test_known_values(self):
        logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 4.0]])
        assert class_accuracy(logits, torch.tensor([0, 0, 1])).tolist() == [1.0, 0.0, 1.0]
        assert judge_agreement(logits, -logits).tolist() == [0.0, 0.0, 0.0]
        assert judge_agreement(logits, logits * 3).tolist() == [1.0, 1.0, 1.0]

    def test_refusals(self):
        logits = noise(3, 2)
        with pytest.raises(MetricUndefined, match=r"^class_accuracy: logits of shape \(3, 2\) and labels of shape"):
            class_accuracy(logits, [0, 1])
        with pytest.raises(MetricUndefined, match=r"^class_accuracy: labels from 0 to 2 for a judge of 2 classes"):
            class_accuracy(logits, [0, 1, 2])
        logits[1, 0] = math.nan
        with pytest.raises(MetricUndefined, match=r"^judge_agreement: sample 1 is nan"):
            judge_agreement(logits, logits)
        with pytest.raises(MetricUndefined, match=r"^class_accuracy: sample 1 is nan"):
            class_accuracy(logits, [0, 1, 1])


class TestFrechet:
    def test_equal_sets(self):
        x = noise(50, 8)
        assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-10)
        assert frechet_distance(x, x.flip(0)) == pytest.approx(0.0, abs=1e-10)

    def test_shift_and_scale_of_one_set(self):
        """m and C are known exactly: a shift adds its square, a scale s multiplies every deviation."""
        x = noise(200, 6).double()
        x -= x.mean(0)
        deviations = float(x.var(0).sum())
        assert frechet_distance(x + 2.0, x) == pytest.approx(6 * 4.0, rel=1e-5)
        assert frechet_distance(3.0 * x, x) == pytest.approx(deviations * (3.0 - 1.0) ** 2, rel=1e-5)

    def test_agrees_with_a_matrix_root_of_correlated_gaussians(self):
        from scipy.linalg import sqrtm

        a, b = noise(400, 5) @ noise(5, 5, seed=1), noise(300, 5, seed=2) @ noise(5, 5, seed=3) + 0.3
        cov_a, cov_b = np.cov(a.double().numpy().T), np.cov(b.double().numpy().T)
        root = sqrtm(cov_a @ cov_b).real
        gap = (a.double().mean(0) - b.double().mean(0)).numpy()
        expected = gap @ gap + np.trace(cov_a + cov_b - 2 * root)
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)

    def test_more_features_than_samples(self):
        x = noise(5, 20)
        assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-10)
        assert frechet_distance(x, noise(7, 20, seed=1)) > 1.0

    def test_refusals(self):
        with pytest.raises(MetricUndefined, match=r"^frechet_judge: features of shape \(1, 4\)"):
            frechet_distance(noise(1, 4), noise(5, 4))
        with pytest.raises(MetricUndefined, match=r"^frechet_judge: sample 0 is nan"):
            frechet_distance(noise(5, 4) * math.nan, noise(5, 4))


class TestTokenStatistics:
    def test_a_model_with_itself(self):
        logits, targets = 5 * noise(40, 300), torch.arange(40)
        found = token_statistics(logits, logits, targets)
        np.testing.assert_allclose(found["kld"], 0.0, atol=1e-12)
        assert found["same_top1"].tolist() == [1.0] * 40
        np.testing.assert_array_equal(found["delta_p"], 0.0)
        np.testing.assert_array_equal(found["nll_candidate"], found["nll_reference"])

    def test_known_values(self):
        p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.2, 0.6, 0.2]])
        found = token_statistics(p.log(), q.log(), torch.tensor([1]))
        kld = 0.5 * math.log(2.5) + 0.25 * math.log(0.25 / 0.6) + 0.25 * math.log(1.25)
        assert found["kld"][0] == pytest.approx(kld, rel=1e-6)
        assert found["delta_p"][0] == pytest.approx(0.35, rel=1e-6)
        assert found["same_top1"][0] == 0.0
        assert found["nll_reference"][0] == pytest.approx(math.log(4), rel=1e-6)
        assert found["nll_candidate"][0] == pytest.approx(-math.log(0.6), rel=1e-6)
        assert token_statistics(q.log(), p.log(), torch.tensor([1]))["kld"][0] != pytest.approx(kld, rel=1e-3)

    @settings(max_examples=40, deadline=None)
    @given(
        tokens=st.integers(1, 6),
        vocab=st.integers(2, 3000),
        scale=st.floats(0.0, 50.0),
        damage=st.sampled_from([0.0, 1e-6, 1e-4, 1e-2, 1.0]),
        seed=st.integers(0, 10_000),
    )
    def test_divergence_is_not_negative_and_that_of_float64(self, tokens, vocab, scale, damage, seed):
        p = scale * noise(tokens, vocab, seed=seed)
        q = p + damage * noise(tokens, vocab, seed=seed + 1)
        found = token_statistics(p, q, torch.zeros(tokens, dtype=torch.int64))
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        exact = (log_p.exp() * (log_p - log_q)).sum(-1).numpy()
        assert found["kld"].min() >= 0, "what rounding alone makes of a divergence of 0"
        np.testing.assert_allclose(found["kld"], exact, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found["nll_candidate"], -log_q[:, 0].numpy(), rtol=1e-5, atol=1e-5)

    @settings(max_examples=20, deadline=None)
    @given(cut=st.integers(1, 299), seed=st.integers(0, 1000))
    def test_batches_may_be_split_anywhere(self, cut, seed):
        p, q = 3 * noise(300, 50, seed=seed), 3 * noise(300, 50, seed=seed + 1)
        targets = torch.arange(300) % 50
        with mock.patch.object(kl, "LOGITS_AT_ONCE", 50 * 37):
            whole = token_statistics(p, q, targets)
        parts = [token_statistics(p[s], q[s], targets[s]) for s in (slice(cut), slice(cut, None))]
        for name, values in whole.items():
            joined = np.concatenate([part[name] for part in parts])
            np.testing.assert_allclose(joined, values, rtol=1e-6, atol=1e-9)

    def test_rounding_in_a_large_vocabulary_is_far_below_the_limit(self):
        """Without renormalising, fp32 gives -1e-6 here: a good model would be refused."""
        p = 100 + noise(64, 49152)
        q = p + 1e-5 * noise(64, 49152, seed=1)
        assert np.abs(token_statistics(p, q, torch.zeros(64, dtype=torch.int64))["kld"]).max() < 2e-8

    def test_a_masked_token_adds_nothing(self):
        p, q = noise(3, 10), noise(3, 10, seed=1)
        masked = [torch.cat([x, torch.full((3, 1), -math.inf)], 1) for x in (p, q)]
        targets = torch.tensor([0, 1, 2])
        np.testing.assert_allclose(
            token_statistics(*masked, targets)["kld"], token_statistics(p, q, targets)["kld"], rtol=1e-5
        )

    def test_an_excluded_token_makes_what_it_reaches_infinite_and_nothing_else(self):
        p = noise(3, 10)
        q = p.clone()
        q[1, 4] = -math.inf  # the candidate gives token 4 no probability, where the reference does
        found = token_statistics(p, q, torch.tensor([0, 1, 2]))
        assert np.isinf(found["kld"]).tolist() == [False, True, False]
        assert all(np.isfinite(found[name]).all() for name in found if name != "kld")
        hit = token_statistics(p, q, torch.tensor([0, 4, 2]))
        assert np.isinf(hit["nll_candidate"]).tolist() == [False, True, False]
        assert hit["delta_p"][1] == pytest.approx(-float(p[1].softmax(0)[4]))
        both = token_statistics(q, q, torch.tensor([0, 4, 2]))
        assert np.isnan(ln_ppl_ratio(both["nll_candidate"], both["nll_reference"])).tolist() == [False, True, False]
        assert np.isfinite(both["kld"]).all()

    def test_16_bit_logits_would_inflate_the_divergence_and_are_refused(self):
        p = 4 * noise(50, 2000)
        q = p + 0.01 * noise(50, 2000, seed=1)
        targets = torch.zeros(50, dtype=torch.int64)
        good = token_statistics(p, q, targets)["kld"].mean()
        rounded = token_statistics(p.bfloat16().float(), q.bfloat16().float(), targets)["kld"].mean()
        assert rounded > 1.2 * good
        for dtype in (torch.bfloat16, torch.float16):
            with pytest.raises(MetricUndefined, match=r"^kld: the candidate's logits are .*float16; .*lm_head.*32$"):
                token_statistics(p, q.to(dtype), targets)

    def test_refusals(self):
        p, targets = noise(3, 5), torch.tensor([0, 1, 2])
        with pytest.raises(MetricUndefined, match=r"^kld: reference logits \(3, 5\), candidate logits \(3, 4\)"):
            token_statistics(p, p[:, :4], targets)
        with pytest.raises(MetricUndefined, match=r"^kld: targets from 0 to 5 for a vocabulary of 5"):
            token_statistics(p, p, torch.tensor([0, 1, 5]))
        broken = p.clone()
        broken[1, 2] = math.nan
        for pair in ((p, broken), (broken, p)):
            with pytest.raises(MetricUndefined, match=r"^kld of tokens: sample 1 is nan"):
                token_statistics(*pair, targets)

    def test_quantiles(self):
        kld = np.arange(1001) / 1000
        found = kld_quantiles(kld)
        assert found == pytest.approx(
            {"kld_median": 0.5, "kld_p90": 0.9, "kld_p99": 0.99, "kld_p999": 0.999, "kld_max": 1.0, "kld_min": 0.0}
        )
        assert kld_quantiles(kld - 5e-7)["kld_min"] == pytest.approx(-5e-7)
        with_infinite = kld_quantiles(np.where(np.arange(1001) >= 990, np.inf, kld))
        assert {name for name, value in with_infinite.items() if math.isinf(value)} == {
            "kld_p99",
            "kld_p999",
            "kld_max",
        }
        assert with_infinite["kld_p90"] == pytest.approx(0.9)
        with pytest.raises(MetricUndefined, match=r"^kld_min: token 7 has a divergence of -2e-06 nats.*fp32 logits$"):
            kld_quantiles(np.where(np.arange(10) == 7, -2e-6, 0.1))


class TestPerplexity:
    def test_known_values(self):
        assert perplexity(np.full(7, math.log(20.0))) == pytest.approx(20.0)
        ratio = ln_ppl_ratio([1.0, 2.5], [1.5, 1.0])
        np.testing.assert_allclose(ratio, [-0.5, 1.5])
        assert math.exp(ratio.mean()) == pytest.approx(perplexity([1.0, 2.5]) / perplexity([1.5, 1.0]))

    def test_refusals(self):
        with pytest.raises(MetricUndefined, match="^ppl: sample 1 is inf"):
            perplexity([1.0, math.inf])
        with pytest.raises(MetricUndefined, match="^ppl: no samples"):
            perplexity([])
        assert math.isfinite(perplexity([709.0]))
        with pytest.raises(MetricUndefined, match=r"^ppl: exp\(1000\).* is beyond float64"):
            perplexity([500.0, 1500.0])
        with pytest.raises(MetricUndefined, match="^ln_ppl_ratio: .*score the same tokens$"):
            ln_ppl_ratio([1.0], [1.0, 2.0])
