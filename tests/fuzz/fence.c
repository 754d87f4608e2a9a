/* Each allocation of some size ends at a page that cannot be touched. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
static int on; void fence_on(int v){on=v;}
#define PAGE 4096UL
#define SLOTS (1<<16)
static void *slot_ptr[SLOTS]; static void *slot_map[SLOTS]; static size_t slot_len[SLOTS];
static unsigned h(void*p){ return (unsigned)(((uintptr_t)p>>2)*2654435761u)%SLOTS; }
static size_t align_min=4;
__attribute__((constructor)) static void init(){ char*a=getenv("FENCE_ALIGN"); if(a) align_min=atoi(a); }
int posix_memalign(void **out, size_t align, size_t size){
  static int (*real)(void**,size_t,size_t); if(!real) real=dlsym(RTLD_NEXT,"posix_memalign");
  if(!on||size==0||size>(1UL<<34)) return real(out,align,size);
  size_t body=(size+PAGE-1)/PAGE*PAGE, total=body+2*PAGE;
  char*m=mmap(0,total,PROT_READ|PROT_WRITE,MAP_PRIVATE|MAP_ANONYMOUS|MAP_NORESERVE,-1,0);
  if(m==MAP_FAILED) return ENOMEM;
  if(body<(1UL<<20)) memset(m+PAGE,0xAB,body);
  mprotect(m,PAGE,PROT_NONE); mprotect(m+PAGE+body,PAGE,PROT_NONE);
  uintptr_t p=(uintptr_t)(m+PAGE+body-size); size_t al=align_min; while(al>1 && (p & (al-1))) p-=1; 
  for(unsigned i=h((void*)p),n=0;n<SLOTS;n++,i=(i+1)%SLOTS) if(!slot_ptr[i]){slot_ptr[i]=(void*)p;slot_map[i]=m;slot_len[i]=total;*out=(void*)p;return 0;}
  munmap(m,total); return real(out,align,size);
}
void free(void*p){
  static void (*real)(void*); if(!real) real=dlsym(RTLD_NEXT,"free");
  if(p&&on) for(unsigned i=h(p),n=0;n<64;n++,i=(i+1)%SLOTS) if(slot_ptr[i]==p){ slot_ptr[i]=0; munmap(slot_map[i],slot_len[i]); return; }
  real(p);
}
