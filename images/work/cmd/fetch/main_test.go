package main

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

func TestFetch(t *testing.T) {
	mux := http.NewServeMux()
	mux.HandleFunc("/page", func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte("0123456789")) })
	mux.HandleFunc("/slow", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	server := httptest.NewServer(mux)
	defer server.Close()

	for _, c := range []struct {
		path  string
		limit int64
		want  string // page, or text of the error
		ok    bool
	}{
		{"/page", 100, "0123456789", true},
		{"/page", 10, "0123456789", true},
		{"/page", 9, "larger than 9 bytes", false},
		{"/absent", 100, "404", false},
		{"/slow", 100, "deadline", false},
	} {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		if c.path == "/slow" {
			ctx, cancel = context.WithTimeout(ctx, 20*time.Millisecond)
		}
		var b strings.Builder
		err := fetch(ctx, server.URL+c.path, c.limit, &b)
		cancel()
		if c.ok && (err != nil || b.String() != c.want) {
			t.Errorf("%s: got %q, %v", c.path, b.String(), err)
		}
		if !c.ok && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: got error %v, want one with %q", c.path, err, c.want)
		}
		if c.path == "/absent" && !errors.Is(err, errStatus) {
			t.Errorf("%v is not errStatus", err)
		}
	}
}
