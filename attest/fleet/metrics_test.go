package fleet

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"sekisho/attest"
)

// TestMetrics: what happened stands in the metrics, and no device's name.
func TestMetrics(t *testing.T) {
	b := newBench(t)
	b.full(false)
	d, id := b.enrolled()
	good, err := b.evidence(d, id, b.nonce(id)).Encode()
	if err != nil {
		t.Fatal(err)
	}
	h := Handler(b.service, slog.New(slog.DiscardHandler))
	for path, body := range map[string]string{attest.PathAttest: string(good), attest.PathAttest + "?": "rubbish", attest.PathEnrolBegin: `{"ticket":"x"}`} {
		h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("POST", path, strings.NewReader(body)))
	}
	w := httptest.NewRecorder()
	b.service.MetricsHandler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	text := w.Body.String()
	if w.Code != http.StatusOK {
		t.Fatal(w.Code, text)
	}
	for _, want := range []string{
		`sekisho_verifier_results_total{reason="",status="affirming"} 1`,
		`sekisho_verifier_results_total{reason="evidence-malformed",status="contraindicated"} 1`,
		`sekisho_verifier_refusals_total{reason="ek-attributes",request="enrol begin"} 1`,
		`sekisho_verifier_appraisal_seconds_count 2`,
		`sekisho_verifier_archive_bytes `, `sekisho_verifier_ramp_pace 512`, `sekisho_verifier_evidence_waiting 0`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("%s is not in\n%s", want, text)
		}
	}
	if strings.Contains(text, id.String()) {
		t.Error("a device's id is in the metrics")
	}
	w = httptest.NewRecorder()
	b.service.MetricsHandler().ServeHTTP(w, httptest.NewRequest("GET", "/debug/pprof/", nil))
	if w.Code != http.StatusNotFound {
		t.Error(w.Code)
	}
}
