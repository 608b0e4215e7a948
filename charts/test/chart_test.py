"""Tests of the chart `drover` with the real Helm engine.

Lint and Render look at the objects, Schema at what is refused, and Start runs three controllers
with the rendered command line and environment until each says that it is ready: a flag that
drover-controller does not know, or a wrong address, cannot hide.
"""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest

import grpc
import helm_python as helm

CHART = pathlib.Path(__file__).resolve().parent.parent / "drover"
CONTROLLER = pathlib.Path(os.environ["CARGO_TARGET_DIR"]) / "debug" / "drover-controller"
NAMESPACE = "hosting"
START_SECONDS_MAX = 120
STOP_SECONDS_MAX = 20


def render(values=None, name="drover"):
    """The chart's objects by (kind, name); the notes under ("Notes", "")."""
    with helm.Chart.load(CHART) as chart:
        files = chart.render(values=values, name=name, namespace=NAMESPACE)
    objects = {}
    for path, text in files.items():
        if path.endswith("NOTES.txt"):
            objects["Notes", ""] = text
        elif text.strip():
            assert not re.search(r"^---$", text, re.M), f"{path}: one object a file"
            it = helm.values_from_yaml(text)
            objects[it["kind"], it["metadata"]["name"]] = it
    return objects


def controller(objects, name="drover"):
    return objects["StatefulSet", name]["spec"]["template"]["spec"]["containers"][0]


class Lint(unittest.TestCase):
    def test_strict_lint_is_clean(self):
        report = helm.lint(CHART, strict=True, namespace=NAMESPACE, kube_version="v1.32.0")
        bad = [m for m in report["messages"] if m["severity"] >= 2]
        self.assertEqual((bad, report["errors"]), ([], []))
        self.assertEqual(report["total_charts_linted"], 1)

    def test_versions_match_the_workspace(self):
        manifest = (CHART.parent.parent / "Cargo.toml").read_text()
        version = re.search(r'^version = "([^"]+)"', manifest, re.M).group(1)
        with helm.Chart.load(CHART) as chart:
            self.assertEqual(chart.metadata["appVersion"], version)


class Render(unittest.TestCase):
    def test_defaults(self):
        objects = render()
        self.assertEqual(
            sorted(objects),
            [
                ("Notes", ""),
                ("PodDisruptionBudget", "drover"),
                ("Service", "drover"),
                ("Service", "drover-members"),
                ("StatefulSet", "drover"),
            ],
        )
        spec = objects["StatefulSet", "drover"]["spec"]
        self.assertEqual(spec["replicas"], 3)
        self.assertEqual(spec["podManagementPolicy"], "Parallel")
        self.assertEqual(spec["serviceName"], "drover-members")
        self.assertEqual(spec["ordinals"], {"start": 1})
        claim = spec["volumeClaimTemplates"][0]
        self.assertEqual(claim["spec"]["resources"]["requests"]["storage"], "4Gi")
        self.assertNotIn("storageClassName", claim["spec"])
        self.assertEqual(objects["PodDisruptionBudget", "drover"]["spec"]["maxUnavailable"], 1)

    def test_selectors_find_the_pods(self):
        objects = render({"podLabels": {"team": "infra"}})
        stateful_set = objects["StatefulSet", "drover"]["spec"]
        labels = stateful_set["template"]["metadata"]["labels"]
        self.assertEqual(labels["team"], "infra")
        selectors = [
            stateful_set["selector"]["matchLabels"],
            objects["PodDisruptionBudget", "drover"]["spec"]["selector"]["matchLabels"],
            objects["Service", "drover"]["spec"]["selector"],
            objects["Service", "drover-members"]["spec"]["selector"],
        ]
        for selector in selectors:
            self.assertLessEqual(selector.items(), labels.items())
        ports = {p["name"] for p in controller(objects)["ports"]}
        for service in ("drover", "drover-members"):
            targets = {p["targetPort"] for p in objects["Service", service]["spec"]["ports"]}
            self.assertLessEqual(targets, ports)

    def test_members_find_each_other_before_they_are_ready(self):
        headless = render()["Service", "drover-members"]["spec"]
        self.assertEqual(headless["clusterIP"], "None")
        self.assertIs(headless["publishNotReadyAddresses"], True)

    def test_every_member_is_named_by_its_pod(self):
        args = controller(render())["args"]
        members = [a for a in args if a.startswith("--member=")]
        self.assertEqual(
            members,
            [f"--member={n}=drover-{n}.drover-members.{NAMESPACE}.svc:7400" for n in (1, 2, 3)],
        )

    def test_the_pod_is_locked_down(self):
        objects = render()
        pod = objects["StatefulSet", "drover"]["spec"]["template"]["spec"]
        self.assertIs(pod["securityContext"]["runAsNonRoot"], True)
        self.assertIs(pod["automountServiceAccountToken"], False)
        own = controller(objects)["securityContext"]
        self.assertIs(own["readOnlyRootFilesystem"], True)
        self.assertIs(own["allowPrivilegeEscalation"], False)
        self.assertEqual(own["capabilities"], {"drop": ["ALL"]})
        data = [a for a in controller(objects)["args"] if a.startswith("--data-dir=")]
        mount = controller(objects)["volumeMounts"][0]["mountPath"]
        self.assertTrue(data[0].startswith(f"--data-dir={mount}/"), "the only writable place")

    def test_probes(self):
        container = controller(render({"port": 7500}))
        services = {}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            self.assertEqual(container[probe]["grpc"]["port"], 7500)
            services[probe] = container[probe]["grpc"].get("service", "")
        expected = {"startupProbe": "live", "livenessProbe": "live", "readinessProbe": ""}
        self.assertEqual(services, expected)

    def test_varied_values(self):
        objects = render(
            {
                "members": 5,
                "clusterId": "prod",
                "addresses": [f"ctl{n}.example.net:7400" for n in range(1, 6)],
                "otlpEndpoint": "http://collector.monitoring:4317",
                "nodeLease": "30s",
                "persistence": {"size": "10Gi", "storageClassName": "fast"},
                "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
                "podDisruptionBudget": {"enabled": False},
                "antiAffinity": "hard",
                "image": {"repository": "registry.example.net/drover-controller", "tag": "1.2.3"},
                "tolerations": [{"key": "infra", "operator": "Exists"}],
                "nodeSelector": {"disk": "ssd"},
                "podAnnotations": {"c": "d"},
                "imagePullSecrets": [{"name": "pull"}],
                "priorityClassName": "system-cluster-critical",
            },
            name="prod",
        )
        name = "prod-drover"
        self.assertNotIn(("PodDisruptionBudget", name), objects)
        container = controller(objects, name)
        self.assertEqual(container["image"], "registry.example.net/drover-controller:1.2.3")
        for arg in (
            "--cluster-id=prod",
            "--member=5=ctl5.example.net:7400",
            "--otlp-endpoint=http://collector.monitoring:4317",
            "--node-lease=30s",
        ):
            self.assertIn(arg, container["args"])
        pod = objects["StatefulSet", name]["spec"]["template"]["spec"]
        affinity = pod["affinity"]["podAntiAffinity"]
        self.assertIn("requiredDuringSchedulingIgnoredDuringExecution", affinity)
        self.assertEqual(pod["tolerations"], [{"key": "infra", "operator": "Exists"}])
        self.assertEqual(pod["nodeSelector"], {"disk": "ssd"})
        self.assertEqual(pod["priorityClassName"], "system-cluster-critical")
        claim = objects["StatefulSet", name]["spec"]["volumeClaimTemplates"][0]["spec"]
        self.assertEqual(claim["storageClassName"], "fast")
        service = objects["Service", name]
        self.assertEqual(service["spec"]["type"], "LoadBalancer")
        self.assertEqual(service["metadata"]["annotations"], {"a": "b"})
        self.assertIn("--controller ctl1.example.net:7400", objects["Notes", ""])

    def test_notes_say_how_to_go_on(self):
        notes = render()["Notes", ""]
        self.assertIn(f"kubectl -n {NAMESPACE} port-forward service/drover 7400", notes)
        self.assertIn("cluster status", notes)
        self.assertIn('set "addresses"', notes)
        self.assertNotIn("{{", notes)


class Schema(unittest.TestCase):
    """Wrong values are refused by name, before anything is rendered."""

    def refused(self, values, word):
        with self.assertRaises(helm.HelmError) as raised:
            render(values)
        self.assertIn(word, str(raised.exception))

    def test_defaults_pass(self):
        with helm.Chart.load(CHART) as chart:
            chart.validate_schema()

    def test_refusals(self):
        cases = [
            ({"replicas": 3}, "replicas"),
            ({"members": 2}, "members"),
            ({"members": "3"}, "members"),
            ({"port": 80}, "port"),
            ({"clusterId": "a/b"}, "clusterId"),
            ({"addresses": ["ctl1"]}, "addresses"),
            ({"nodeLease": "15"}, "nodeLease"),
            ({"otlpEndpoint": "collector:4317"}, "otlpEndpoint"),
            ({"otlpEndpoint": "https://collector:4317"}, "otlpEndpoint"),
            ({"log": {"format": "xml"}}, "log"),
            ({"persistence": {"size": "4"}}, "size"),
            ({"persistence": {"sise": "4Gi"}}, "sise"),
            ({"service": {"type": "ExternalName"}}, "service"),
            ({"antiAffinity": "very"}, "antiAffinity"),
            ({"image": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
            ({"resources": {"requests": {"memory": "much"}}}, "memory"),
            ({"terminationGracePeriodSeconds": 0}, "terminationGracePeriodSeconds"),
        ]
        for values, word in cases:
            with self.subTest(values=values):
                self.refused(values, word)

    def test_addresses_are_one_for_each_member(self):
        self.refused({"addresses": ["ctl1:7400", "ctl2:7400"]}, "addresses: 2 given")


def free_ports(count):
    """Loopback ports that nobody has now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for it in sockets:
            it.bind(("127.0.0.1", 0))
        return [it.getsockname()[1] for it in sockets]
    finally:
        for it in sockets:
            it.close()


def health(port, service):
    """What grpc.health.v1.Health/Check answers: "SERVING", "NOT_SERVING", or the failure."""
    request = b"\x0a" + bytes([len(service)]) + service.encode() if service else b""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        try:
            # HealthCheckResponse { status = 1 }, an enum.
            answer = check(request, timeout=2)
        except grpc.RpcError as error:
            return error.code().name
    return {b"\x08\x01": "SERVING", b"\x08\x02": "NOT_SERVING"}.get(answer, repr(answer))


class Pod:
    """One controller as the rendered pod starts it. Kubernetes's part is done here, and nothing
    else: `$(NAME)` in the arguments, the pod-index label, the volume (a directory), the members'
    DNS names (a loopback port each), and the pod's own address space (its port at --listen)."""

    def __init__(self, stateful_set, number, ports, volume):
        container = stateful_set["spec"]["template"]["spec"]["containers"][0]
        self.number, self.port = number, ports[number]
        self.probes = [container[p]["grpc"] for p in ("startupProbe", "livenessProbe", "readinessProbe")]
        environment = {"PATH": os.environ["PATH"]}
        for variable in container["env"]:
            environment[variable["name"]] = self.value(variable, stateful_set)
        args = [self.on_loopback(self.expanded(a, environment), stateful_set, ports) for a in container["args"]]
        mount = container["volumeMounts"][0]["mountPath"]
        args = [a.replace(f"={mount}/", f"={volume}/") for a in args]
        assert container["command"] == ["drover-controller"]
        self.log = open(volume / "log", "w+")
        self.command = [str(CONTROLLER), *args]
        self.process = subprocess.Popen(self.command, env=environment, stderr=self.log, cwd=volume)

    def value(self, variable, stateful_set):
        if "value" in variable:
            return variable["value"]
        path = variable["valueFrom"]["fieldRef"]["fieldPath"]
        assert path == "metadata.labels['apps.kubernetes.io/pod-index']", path
        assert self.number >= stateful_set["spec"]["ordinals"]["start"]
        return str(self.number)

    @staticmethod
    def expanded(arg, environment):
        return re.sub(r"\$\((\w+)\)", lambda m: environment[m.group(1)], arg)

    def on_loopback(self, arg, stateful_set, ports):
        name, service = stateful_set["metadata"]["name"], stateful_set["spec"]["serviceName"]
        if arg.startswith("--listen="):
            assert arg == "--listen=0.0.0.0:7400", arg
            return f"--listen=127.0.0.1:{self.port}"
        for number, port in ports.items():
            dns = f"{name}-{number}.{service}.{NAMESPACE}.svc:7400"
            if arg.endswith(f"={dns}"):
                return arg.replace(dns, f"127.0.0.1:{port}")
        return arg

    def last_words(self):
        self.log.flush()
        self.log.seek(0)
        return f"{' '.join(self.command)}\n{self.log.read()[-3000:]}"

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            self.log.close()


class Start(unittest.TestCase):
    """Three controllers from the rendered StatefulSet become ready, one alone does not."""

    def setUp(self):
        self.assertTrue(CONTROLLER.exists(), f"{CONTROLLER} is missing: cargo build -p drover-controller")
        self.stateful_set = render()["StatefulSet", "drover"]
        directory = tempfile.TemporaryDirectory(prefix="drover-chart-")
        self.addCleanup(directory.cleanup)
        self.directory = pathlib.Path(directory.name)
        self.ports = dict(zip((1, 2, 3), free_ports(3)))

    def start(self, number):
        volume = self.directory / f"pod-{number}"
        volume.mkdir()
        pod = Pod(self.stateful_set, number, self.ports, volume)
        self.addCleanup(pod.stop)
        return pod

    def wait_for(self, pod, service, status):
        deadline = time.monotonic() + START_SECONDS_MAX
        said = None
        while time.monotonic() < deadline:
            if pod.process.poll() is not None:
                self.fail(f"member {pod.number} ended with {pod.process.returncode}: {pod.last_words()}")
            said = health(pod.port, service)
            if said == status:
                return
            time.sleep(0.1)
        self.fail(f"member {pod.number} says {said} to {service!r}, not {status}: {pod.last_words()}")

    def test_three_become_ready_and_one_alone_is_only_alive(self):
        first = self.start(1)
        self.wait_for(first, "live", "SERVING")
        self.assertEqual(health(first.port, ""), "NOT_SERVING", "alone it cannot know a leader")
        pods = [first, self.start(2), self.start(3)]
        for pod in pods:
            for probe in pod.probes:
                self.wait_for(pod, probe.get("service", ""), "SERVING")
        for pod in pods:
            words = pod.last_words()
            self.assertEqual(pod.stop(), 0, f"SIGTERM ends it in order: {words}")

    def test_a_wrong_flag_would_show(self):
        args = self.stateful_set["spec"]["template"]["spec"]["containers"][0]["args"]
        args.append("--no-such-flag=1")
        pod = self.start(1)
        self.assertEqual(pod.process.wait(STOP_SECONDS_MAX), 2)
        self.assertIn("--no-such-flag", pod.last_words())


def main():
    suite = unittest.defaultTestLoader
    module = sys.modules[__name__]
    tests = suite.loadTestsFromNames(sys.argv[1:], module) if sys.argv[1:] else suite.loadTestsFromModule(module)
    result = unittest.TextTestRunner(verbosity=2).run(tests)
    failed = len(result.failures) + len(result.errors)
    verdict = "ok" if result.wasSuccessful() and result.testsRun else "FAILED"
    passed = result.testsRun - failed
    print(f"test result: {verdict}. {passed} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out")
    return 0 if verdict == "ok" else 1


if __name__ == "__main__":
    sys.exit(main())
